"""What a shard becomes on storage: one Parquet object, and a PNG tree where it is asked for."""
