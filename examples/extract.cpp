// Copies the contents of an image, or of one of its snapshots, into a raw file.

#include <cstdio>

#include "qcow/copy.h"
#include "qcow/files_in_use.h"
#include "qcow/image.h"

namespace {

qcow::Result<void> extract(const char* source_path, const char* target_path, const char* snapshot) {
    auto storage = qcow::open_file(source_path);
    if (!storage) return std::unexpected(storage.error());
    auto image = qcow::open_image(*storage, {.gate = qcow::local_files()});
    if (!image) return std::unexpected(image.error());
    std::shared_ptr<qcow::Disk> source = *image;
    if (snapshot != nullptr) {
        auto found = (*image)->snapshot(snapshot);
        if (!found) return std::unexpected(found.error());
        source = *found;
    }

    // The target shows up under its name when it is complete, and not before.
    // It may not be one of the files that are read.
    qcow::FilesInUse in_use;
    if (auto added = in_use.add(qcow::FilesInUse::Use::read, **image, "the source"); !added) return added;
    auto file = qcow::NewFile::begin(target_path, in_use, "the target");
    if (!file) return std::unexpected(file.error());
    if (auto sized = file->storage()->resize(source->size()); !sized) return sized;
    auto target = qcow::open_image(file->storage(), {.writable = true, .format = qcow::Format::raw});
    if (!target) return std::unexpected(target.error());
    if (auto copied = qcow::copy_disk(*source, **target, {.target_is_zero = file->starts_as_zeros()}); !copied)
        return copied;
    return file->publish();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3 && argc != 4) {
        std::fprintf(stderr, "usage: extract IMAGE TARGET [SNAPSHOT]\n");
        return 1;
    }
    if (auto done = extract(argv[1], argv[2], argc == 4 ? argv[3] : nullptr); !done) {
        std::fprintf(stderr, "%s\n", done.error().message().c_str());
        return 1;
    }
}
