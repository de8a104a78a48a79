"""The run's typed schema, section by section, and how files and overrides become one `RunConfig`."""
