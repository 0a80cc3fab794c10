"""What alembic runs: the migrations, on the connection that `migrate` hands over, in its transaction."""

from alembic import context

from stores.migrations import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], transactional_ddl=False, version_table=VERSION_TABLE
)
context.run_migrations()
