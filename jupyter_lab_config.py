"""JupyterLab in this project: to open a notebook does not change it.

JupyterLab writes name and language of the kernel into each notebook that it opens, which then counts as changed; `nbdev_clean` takes both out again. So a
notebook gets them as it is read.
"""
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import get_kernel_spec
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

KERNEL = get_kernel_spec("python3")


class OpenUnchanged(AsyncLargeFileManager):
    """Files, with what JupyterLab would add to a notebook."""

    async def get(self, *args, **kwargs) -> dict:
        """A file or folder, as the parent class gives it."""
        model = await super().get(*args, **kwargs)
        if model["type"] == "notebook" and model["content"]:
            spec = {"display_name": KERNEL.display_name, "language": KERNEL.language, "name": "python3"}
            model["content"]["metadata"].update(kernelspec=spec, language_info=IPythonKernel.language_info)
        return model


c = get_config()  # noqa: F821 (Jupyter puts it there)
c.ServerApp.contents_manager_class = OpenUnchanged
