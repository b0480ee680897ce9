"""Where a run is put together: settings to data, plan, model, trainer and folder."""
