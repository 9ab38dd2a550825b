"""What a job measures of itself while it runs, and what people are shown of it."""
