"""Losses, schedules, the trainer and its evaluator."""
