"""Interventions estimated from gradients, always beside some that are run exactly."""
