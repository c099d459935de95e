"""Commands around training: the demo, the plan of a run, the report, the doctor."""
