#pragma once
// The sources of a specification: what a name stands for.

#include <memory>
#include <string>

#include "build/tree.h"
#include "operation/new_image.h"
#include "qcow/build.h"
#include "qcow/disk.h"
#include "qcow/files_in_use.h"

namespace qcow {

/// A job, what it reads, and whom it tells.
struct SourceContext {
    FilesInUse& in_use;
    Warnings& warnings;
    const BuildJob& job;
};

/// The files of a source: of a directory, a tar archive, or the file system of an image or of its partition.
Result<Tree> tree_of(const std::string& source, const SourceContext& context);

/// The disk of an image, or of a partition of it ("IMAGE:N").
Result<std::shared_ptr<Disk>> disk_of_source(const std::string& source, const SourceContext& context);

}  // namespace qcow
