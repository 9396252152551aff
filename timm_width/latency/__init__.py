"""Measured latency."""
from .measure import Measurement, measure, measure_many

__all__ = ['Measurement', 'measure', 'measure_many']
