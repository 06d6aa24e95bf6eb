"""Events in, frames out: upstream models inside `infer`, other teams' samples in `frame`, Parquet in `represent`."""
