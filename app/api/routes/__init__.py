"""One module a group of endpoints; each has `routes(context)`, which makes its APIRouter."""
