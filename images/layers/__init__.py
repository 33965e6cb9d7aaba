"""From one layer's tar to the form that is mounted. Runs in the unprivileged worker, but for `apply` and `jail.Worker`."""
