"""Applications to try tracemw with; each folder has a README. `python -m example_apps.demo` runs both."""
