#include "qcow/create.h"

#include <fmt/format.h>

#include "base/within_memory.h"
#include "disk/padded.h"
#include "operation/copier.h"
#include "operation/new_image.h"
#include "qcow2/builder.h"
#include "storage/growing.h"
#include "storage/zero_bytes.h"

namespace qcow {
namespace {

/// The virtual size of a new image for the contents of `source`.
Result<std::uint64_t> size_for(const Disk& source, const CreateOptions& options) {
    if (options.size == 0) return rounded_size(source.size());
    const std::uint64_t size = rounded_size(options.size);
    if (size >= source.size()) return size;
    return fail(Errc::invalid_argument, "option size",
                fmt::format("the source has {} bytes, and {} have no room for them", source.size(), size));
}

Result<void> verify_raw(const CreateOptions& options) {
    if (options.preallocation == Preallocation::metadata)
        return fail(Errc::invalid_argument, "option preallocation", "a raw disk has no metadata; say falloc or full");
    CreateOptions possible;
    possible.size = options.size;
    possible.preallocation = options.preallocation;
    if (options == possible) return {};
    return fail(Errc::invalid_argument, "options",
                "a raw disk has only size and preallocation; the others are for qcow2");
}

/// Opens the backing file, to see that it is one. Returns its size.
Result<std::uint64_t> verify_backing(const ImageSpec& spec, FilesInUse& in_use, const Warn& warn) {
    auto backing = open_image(spec, warn);
    if (!backing) {
        return std::unexpected(
            std::move(backing).error().in("backing file (-u makes the image without looking at it)"));
    }
    TRY_VOID(in_use.add(FilesInUse::Use::read, **backing, "its backing file"));
    return (*backing)->size();
}

Result<CreateResult> make_image(const CreateJob& job, const JobControl& control) {
    auto image = TRY(with_recorded_names(job.image));
    auto& options = image.options;
    const bool has_backing = !options.backing_name.empty();
    if (image.format == Format::raw && (has_backing || !options.data_file_name.empty())) {
        return fail(Errc::invalid_argument, "target format",
                    "raw images have no backing file and no data file; leave -f raw out");
    }
    Warnings warnings(control.warn);
    FilesInUse in_use;
    if (has_backing) {
        const auto spec = TRY(backing_of(image));
        if (job.unchecked) {
            // What is there of it is not to be overwritten all the same.
            TRY_VOID(in_use.add_unopened(FilesInUse::Use::read, spec, "its backing file"));
        } else {
            const auto size = TRY(verify_backing(spec, in_use, warnings.to()));
            if (job.size_of_backing) options.size = size;
        }
    }
    if (job.size_of_backing && (!has_backing || job.unchecked))
        return fail(Errc::invalid_argument, "size", "how large is the disk to be? Add a SIZE, such as 20G");
    TRY_VOID(make_files(
        image, "the new image", in_use, warnings,
        [&](const NewImageFiles& files, bool) {
            return image.format == Format::raw ? create_raw_image(files.image, options) : create_image(files, options);
        }));
    return CreateResult{image.path, rounded_size(options.size), warnings.take()};
}

}  // namespace

Result<CreateResult> create(const CreateJob& job, const JobControl& control) {
    return within_memory([&] { return make_image(job, control); });
}

Result<void> create_image(const NewImageFiles& files, const CreateOptions& options) {
    return within_memory([&]() -> Result<void> {
        auto builder = TRY(qcow2::Builder::begin(files, options, {}));
        TRY_VOID(builder->preallocate());
        return builder->finish();
    });
}

Result<void> create_raw_image(const std::shared_ptr<Storage>& file, const CreateOptions& options) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_raw(options));
        const std::uint64_t size = rounded_size(options.size);
        const auto empty = TRY(as_empty(file));
        if (options.preallocation == Preallocation::full) return write_zero_bytes(*empty, {0}, size);
        TRY_VOID(empty->resize(size));
        return options.preallocation == Preallocation::falloc ? empty->allocate({0}, size) : Result<void>();
    });
}

Result<void> convert_image(Disk& source, const NewImageFiles& files, const CreateOptions& options,
                           const ConvertOptions& convert) {
    return within_memory([&]() -> Result<void> {
        CreateOptions sized = options;
        sized.size = TRY(size_for(source, options));
        ConvertOptions written = convert;
        if (options.preallocation == Preallocation::full) written.copy.sparse_bytes = 0;
        auto builder = TRY(qcow2::Builder::begin(files, sized, written));
        TRY_VOID(copy_to(*padded(source, sized.size), *builder, written.copy));
        return builder->finish();
    });
}

Result<void> convert_raw_image(Disk& source, const std::shared_ptr<Storage>& file, const CreateOptions& options,
                               const CopyOptions& copy) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_raw(options));
        const std::uint64_t size = TRY(size_for(source, options));
        TRY_VOID(file->resize(size));
        if (options.preallocation == Preallocation::falloc) TRY_VOID(file->allocate({0}, size));
        CopyOptions written = copy;
        if (options.preallocation == Preallocation::full) written.sparse_bytes = 0;
        const auto target = TRY(open_image(file, {.writable = true, .format = Format::raw}));
        return copy_disk(*padded(source, size), *target, written);
    });
}

}  // namespace qcow
