/** Values onto shades: diverging, without colour at the trait's usual value. */

/** Scales of gauges over the tokens that are shown. */
export class Scales {
  constructor(vectors) {
    this.vectors = vectors;
    this.limits = new Map();
  }

  baseline(gauge) {
    return this.vectors.get(gauge.trait)?.baseline?.[gauge.layer] ?? null;
  }

  centre(gauge) {
    return this.baseline(gauge)?.mean ?? 0;
  }

  limit(gauge) {
    return this.limits.get(gauge.name) ?? (3 * (this.baseline(gauge)?.sd ?? 0) || 1);
  }

  /** Let the furthest values have the fullest colour, unless few lie far from all others. */
  fit(gauge, values) {
    const centre = this.centre(gauge);
    const far = values.filter(Number.isFinite).map((value) => Math.abs(value - centre)).sort((a, b) => a - b);
    const own = 3 * (this.baseline(gauge)?.sd ?? 0);
    if (far.length) {
      const usual = 3 * far[Math.floor(0.9 * (far.length - 1))];
      this.limits.set(gauge.name, Math.max(own, Math.min(far.at(-1), usual)) || far.at(-1) || 1);
    } else this.limits.delete(gauge.name);
  }

  /** From -1 to 1; null for no value. */
  share(gauge, value) {
    if (!Number.isFinite(value)) return null;
    return Math.max(-1, Math.min(1, (value - this.centre(gauge)) / this.limit(gauge)));
  }

  sds(gauge, value) {
    const known = this.baseline(gauge);
    return known && known.sd > 0 && Number.isFinite(value) ? (value - known.mean) / known.sd : null;
  }

  digits(gauge) {
    const size = Math.max(this.limit(gauge), Math.abs(this.centre(gauge)));
    return Math.min(Math.max(2 - Math.floor(Math.log10(size || 1)), 0), 6);
  }
}

/** Colour an element by a share. The style sheet mixes, so that light and dark pages have shades of their own. */
export function shade(span, share) {
  span.classList.toggle("high", share > 0);
  span.classList.toggle("low", share < 0);
  span.classList.toggle("none", share === null);
  if (share === null) span.style.removeProperty("--share");
  else span.style.setProperty("--share", `${Math.round(Math.abs(share) * 100)}%`);
}
