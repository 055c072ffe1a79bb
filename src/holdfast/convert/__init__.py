"""Any format to any other, tensor by tensor, in bounded memory. Builds no model, joins no group."""
