"""Reproduction: a plan of commands, the claims read from what they leave, and the one report of both."""

from persona_lens.reproduction.plan import Plan, PlanError, built_in_plans, read_plan
from persona_lens.reproduction.run import Reproduction, reproduce

__all__ = ["Plan", "PlanError", "Reproduction", "built_in_plans", "read_plan", "reproduce"]
