"""Continuous-time deep generative models in JAX, every one of them proved against closed form."""
