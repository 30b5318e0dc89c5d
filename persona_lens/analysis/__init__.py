"""Analysis: how directions stand to one another, what they say, what they are made of, and what they cost."""
