#include "qcow/create.h"

#include <fmt/format.h>

#include <limits>

#include "base/within_memory.h"
#include "disk/padded.h"
#include "luks/volume.h"
#include "operation/copier.h"
#include "operation/new_image.h"
#include "qcow2/builder.h"
#include "storage/growing.h"
#include "storage/zero_bytes.h"

namespace qcow {
namespace {

/// Begins an encrypted disk of `size` bytes, for which `file` has room. Returns the disk, open for writing.
Result<std::shared_ptr<Image>> begin_luks(const std::shared_ptr<Storage>& file, std::uint64_t size,
                                          const CreateOptions& options) {
    const auto header = TRY(luks::make_header(*options.encryption));
    TRY_VOID(file->resize(header.bytes.size() + size));
    if (options.preallocation == Preallocation::falloc) TRY_VOID(file->allocate({0}, header.bytes.size() + size));
    TRY_VOID(file->write({0}, header.bytes));
    const KeySource key = [&](const KeyRequest&) { return Secret(options.encryption->key->bytes()); };
    const auto unbounded = std::numeric_limits<double>::infinity();  // the caller has said how long it takes
    return open_image(file, {.writable = true, .format = Format::luks, .keys = key, .max_kdf_seconds = unbounded});
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
    if (image.format != Format::qcow2 && (has_backing || !options.data_file_name.empty())) {
        return fail(Errc::invalid_argument, "target format",
                    fmt::format("{0} images have no backing file and no data file; leave -f {0} out",
                                format_name(image.format)));
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
            if (image.format == Format::raw) return create_raw_image(files.image, options);
            if (image.format == Format::luks) return create_luks_image(files.image, options);
            return create_image(files, options);
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

Result<void> create_luks_image(const std::shared_ptr<Storage>& file, const CreateOptions& options) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_luks(options));
        const std::uint64_t size = rounded_size(options.size);
        const auto image = TRY(begin_luks(TRY(as_empty(file)), size, options));
        if (options.preallocation == Preallocation::full) TRY_VOID(image->write_zeroes({0}, size));
        return image->close();
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

Result<void> convert_luks_image(Disk& source, const std::shared_ptr<Storage>& file, const CreateOptions& options,
                                const CopyOptions& copy) {
    return within_memory([&]() -> Result<void> {
        TRY_VOID(verify_luks(options));
        const std::uint64_t size = TRY(size_for(source, options));
        const auto target = TRY(begin_luks(file, size, options));
        CopyOptions written = copy;
        written.target_is_zero = false;
        TRY_VOID(copy_disk(*padded(source, size), *target, written));
        return target->close();
    });
}

}  // namespace qcow
