"""What `fg.check` looks at: one subject a file. In goes a loss, a model and an estimator, out come findings."""
