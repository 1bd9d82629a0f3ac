"""Hook of the documentation's build: publish the repository's files that pages link to, such as results and figures.

Pages link to `../benchmarks/results/...`, so that the links also work where the repository is browsed. A link to a file that
does not exist stays as it is, and the strict build fails on it.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"(?<=\]\()\.\./([\w./-]+)(?=[)#])")
ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add each linked file outside docs/ to the site, as `repository/PATH`."""
    for page in list(files.documentation_pages()):
        for path in OUTSIDE.findall(page.content_string):
            if (ROOT / path).is_file() and f"repository/{path}" not in files.src_uris:
                files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
                for image in (ROOT / path).parent.glob("*.png") if path.endswith(".md") else ():
                    name = f"repository/{image.relative_to(ROOT)}"
                    if name not in files.src_uris:
                        files.append(File.generated(config, name, abs_src_path=str(image)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/ at the published copies."""
    return OUTSIDE.sub(lambda match: f"repository/{match[1]}" if (ROOT / match[1]).is_file() else match[0], markdown)
