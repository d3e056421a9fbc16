#include "qcow/create.h"

#include <fmt/format.h>

#include "base/within_memory.h"
#include "disk/padded.h"
#include "operation/copier.h"
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

}  // namespace

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
