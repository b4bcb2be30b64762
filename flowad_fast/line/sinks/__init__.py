"""Where records and alarms go; `rows` turns them into JSON and back."""
