"""vLLM's four classes for QUEST: Backend, Metadata, MetadataBuilder, Impl; one file per device."""
