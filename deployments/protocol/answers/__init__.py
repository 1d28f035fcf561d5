"""The form of every answer: what /openapi.json says, and what tests hold real answers against."""
