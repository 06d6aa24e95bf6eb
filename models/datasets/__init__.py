"""Where events come from: real logs and a simulator, in one columnar form that training and publishing share.

Nothing in this folder imports torch, Kafka or Faust.
"""

from models.datasets.base import Dataset, Impressions

__all__ = ["Dataset", "Impressions"]
