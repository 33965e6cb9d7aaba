"""Documents: SPDX 2.3 and CycloneDX 1.6, as JSON, by the projects' own libraries (the extra `sbom`).

The same image by the same name gives the same bytes: times and identifiers come from it, never from the clock.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ambi.core.errors import InvalidRequest, Unsupported
from images.sbom import databases
from images.sbom.packages import Package, packages

if TYPE_CHECKING:
    from images.model import Image
    from images.store import Store

FORMATS = ("spdx", "cyclonedx")
_MISSING = "install ambi with its extra `sbom`: pip install 'ambi[sbom]'"


def bill_of_materials(store: Store, image: Image, form: str) -> bytes:
    """JSON of `form`, `spdx` or `cyclonedx`. Raises InvalidRequest, and Unsupported without the libraries."""
    if form not in FORMATS:
        raise InvalidRequest(f"'{form}' is no format of a bill of materials", hint="spdx or cyclonedx")
    try:
        _libraries(form)
    except ImportError as error:
        raise Unsupported(f"a bill of materials cannot be written: {error}", hint=_MISSING) from error
    found = databases.read(store, image)
    name = image.names[0] if image.names else image.id
    comment = f"{', '.join(found.unread)} could not be read: packages of rpm may be missing" if found.unread else ""
    write = _spdx if form == "spdx" else _cyclonedx
    return write(image, name, packages(found.files), comment)


def _libraries(form: str) -> None:
    if form == "spdx":
        import spdx_tools.spdx.writer.json.json_writer  # noqa: F401
    else:
        import cyclonedx.output.json  # noqa: F401


def _when(image: Image) -> datetime:
    return datetime.fromtimestamp(max(image.created_ns, 0) // 1_000_000_000, UTC)


def _purl(package: Package) -> str:
    from packageurl import PackageURL

    qualifiers = {"arch": package.architecture} if package.architecture else {}
    version = package.version
    if package.kind == "rpm" and ":" in version:  # rpm's purl has the epoch beside the version
        qualifiers["epoch"], _, version = version.partition(":")
    return PackageURL(package.kind, package.namespace or None, package.name, version, qualifiers or None).to_string()


def _spdx(image: Image, name: str, found: Sequence[Package], comment: str) -> bytes:
    from spdx_tools.spdx.model import (
        Actor,
        ActorType,
        CreationInfo,
        Document,
        ExternalPackageRef,
        ExternalPackageRefCategory,
        PackagePurpose,
        Relationship,
        RelationshipType,
        SpdxNoAssertion,
    )
    from spdx_tools.spdx.model import Package as SpdxPackage
    from spdx_tools.spdx.writer.json.json_writer import write_document_to_stream

    def of(package: Package) -> SpdxPackage:
        purl = _purl(package)
        return SpdxPackage(
            "SPDXRef-Package-" + hashlib.sha256(f"{purl} {package.path}".encode()).hexdigest()[:32],
            package.name,
            SpdxNoAssertion(),
            version=package.version,
            supplier=Actor(ActorType.ORGANIZATION, package.supplier) if package.supplier else SpdxNoAssertion(),
            files_analyzed=False,
            source_info=f"told by /{package.path}",
            license_comment=f"declared as: {package.licence}" if package.licence else None,
            external_references=[ExternalPackageRef(ExternalPackageRefCategory.PACKAGE_MANAGER, "purl", purl)],
        )

    hex_id = image.id.removeprefix("sha256:")
    top = SpdxPackage(
        "SPDXRef-Image", name, SpdxNoAssertion(), version=image.id, files_analyzed=False,
        primary_package_purpose=PackagePurpose.CONTAINER,
    )  # fmt: skip
    info = CreationInfo(
        "SPDX-2.3", "SPDXRef-DOCUMENT", name, f"https://spdx.org/spdxdocs/ambi-{hex_id}",
        [Actor(ActorType.TOOL, "ambi")], _when(image), document_comment=comment or None,
    )  # fmt: skip
    parts = [of(package) for package in found]
    relations = [Relationship("SPDXRef-DOCUMENT", RelationshipType.DESCRIBES, "SPDXRef-Image")]
    relations += [Relationship("SPDXRef-Image", RelationshipType.CONTAINS, part.spdx_id) for part in parts]
    text = io.StringIO()
    document = Document(info, packages=[top, *parts], relationships=relations)
    write_document_to_stream(document, text, validate=False)
    return text.getvalue().encode()


def _cyclonedx(image: Image, name: str, found: Sequence[Package], comment: str) -> bytes:
    from cyclonedx.model import Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.contact import OrganizationalEntity
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    def of(package: Package) -> Component:
        purl = _purl(package)
        return Component(
            name=package.name,
            group=package.namespace if package.kind == "npm" else None,
            version=package.version,
            type=ComponentType.LIBRARY,
            bom_ref=f"{purl}#{package.path}",
            purl=PackageURL.from_string(purl),
            licenses=[DisjunctiveLicense(name=package.licence)] if package.licence else None,
            supplier=OrganizationalEntity(name=package.supplier) if package.supplier else None,
            properties=[Property(name="ambi:path", value=f"/{package.path}")],
        )

    top = Component(name=name, version=image.id, type=ComponentType.CONTAINER, bom_ref=image.id)
    bom = Bom(
        components=[of(package) for package in found],
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, image.id),
        metadata=BomMetaData(
            component=top,
            timestamp=_when(image),
            properties=[Property(name="ambi:unread", value=comment)] if comment else None,
        ),
    )
    bom.register_dependency(top, bom.components)
    written = json.loads(JsonV1Dot6(bom).output_as_string())
    return json.dumps(written, indent=2).encode()
