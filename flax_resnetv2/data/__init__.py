"""From bytes on disk to a ``Batch``; knows no model."""
