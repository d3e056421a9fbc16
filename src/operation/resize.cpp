#include "qcow/resize.h"

#include <fmt/format.h>

#include <limits>

#include "base/within_memory.h"
#include "qcow/text.h"

namespace qcow {
namespace {

/// In bytes. Offsets in files are signed.
constexpr std::uint64_t largest_size = std::numeric_limits<std::int64_t>::max();

/// The size that the job asks for, in whole sectors.
Result<std::uint64_t> new_size(const ResizeJob& job, std::uint64_t old_size, const JobControl& control) {
    const auto& path = job.image.location.path;
    std::uint64_t size = job.bytes;
    if (job.change == ResizeJob::Change::shrink) {
        if (size > old_size) {
            return fail(Errc::invalid_argument, path,
                        fmt::format("the disk has {} bytes, {} fewer cannot be", old_size, size));
        }
        size = old_size - size;
    } else if (job.change == ResizeJob::Change::grow) {
        if (old_size > largest_size || size > largest_size - old_size)
            return fail(Errc::invalid_argument, path, "no disk can be that large");
        size += old_size;
    }
    const auto rounded = rounded_size(size);
    if (rounded != size && control.warn) {
        control.warn(
            {Warning::Kind::rounded_size, fmt::format("{}: {} bytes are not a multiple of {}; rounded up to {}",
                                                      printable(path), size, sector_bytes, rounded)});
    }
    if (rounded < old_size && job.shrink == Image::Shrink::refuse) {
        return fail(
            Errc::invalid_argument, path,
            fmt::format("the disk has {} bytes, and what lies past {} would be lost; say --shrink if that is meant",
                        old_size, rounded));
    }
    return rounded;
}

}  // namespace

Result<ResizeResult> resize(const ResizeJob& job, const JobControl& control) {
    return within_memory([&]() -> Result<ResizeResult> {
        auto spec = job.image;
        if (!spec.write) spec.write.emplace();
        const auto image = TRY(open_image(spec, control.warn));
        ResizeResult result;
        result.old_size = image->size();
        result.new_size = TRY(new_size(job, result.old_size, control));
        TRY_VOID(image->resize(result.new_size, job.shrink));
        TRY_VOID(image->close());
        return result;
    });
}

}  // namespace qcow
