"""Rollout: samples completions from a policy."""
