"""Many takes, on one machine or many: a file of them made exactly once each, and live sessions on workers of a Ray
cluster. Ray is imported by nothing before it is asked for."""
