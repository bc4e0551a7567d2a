"""Why a run went as it did: per module and round, from what its folder keeps."""
