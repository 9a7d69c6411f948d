"""Metrics: functions of arrays, and `torchmetrics.Metric` classes on top of them."""
