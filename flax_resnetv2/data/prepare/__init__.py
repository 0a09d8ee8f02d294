"""From official archives, or nothing, to a directory that TFDS can read."""
