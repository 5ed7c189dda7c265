"""Losses, teachers and data of distillation."""
