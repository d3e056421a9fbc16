#include "server/nbd/session.h"

#include <algorithm>

#include "base/bits.h"
#include "base/within_memory.h"

namespace qcow::nbd {
namespace {

constexpr std::uint32_t state_hole = 1;
constexpr std::uint32_t state_zero = 2;
constexpr std::uint32_t state_dirty = 1;

NbdContext of_extents(std::string name, const std::shared_ptr<Disk>& disk, std::uint32_t (*flags)(const Extent&)) {
    return {std::move(name),
            [disk, flags](GuestOffset at, std::uint64_t length, const NbdContext::Visit& visit) -> Result<void> {
                for (const GuestOffset end = at + length; at < end;) {
                    const auto extent = TRY(disk->extent(at, end - at));
                    if (!visit({extent.length, flags(extent)})) break;
                    at += extent.length;
                }
                return {};
            }};
}

}  // namespace

std::size_t chunk_bytes(const Disk& disk) { return std::clamp(disk.block_size(), 256 * KiB, 2 * MiB); }

std::vector<NbdContext> built_in_contexts(const NbdExport& exported) {
    std::vector<NbdContext> contexts;
    contexts.push_back(of_extents("base:allocation", exported.disk, [](const Extent& extent) {
        return extent.kind == Extent::Kind::data ? 0 : state_hole | state_zero;
    }));
    if (exported.allocation_depth) {
        contexts.push_back(
            of_extents("qemu:allocation-depth", exported.disk, [](const Extent& extent) -> std::uint32_t {
                return extent.kind == Extent::Kind::unallocated ? 0 : extent.depth + 1;
            }));
    }
    return contexts;
}

}  // namespace qcow::nbd

namespace qcow {

namespace {

Result<NbdContext> bitmap_context(std::shared_ptr<Image> image, const std::string& bitmap) {
    TRY_VOID(image->each_dirty(bitmap, {0}, 0, [](const DirtyRun&) { return Result<void>(); }));
    // However many bits are alike, only so many are looked at for one answer.
    constexpr std::uint64_t max_bits = MiB * 8;
    const auto bitmaps = TRY(image->info()).bitmaps;
    const auto found = std::ranges::find(bitmaps, bitmap, &BitmapInfo::name);
    if (found == bitmaps.end()) return fail(Errc::not_found, bitmap, "the bitmap was removed meanwhile");
    const auto most =
        found->granularity > ~std::uint64_t{0} / max_bits ? ~std::uint64_t{0} : found->granularity * max_bits;
    auto status = [image = std::move(image), bitmap, most](GuestOffset at, std::uint64_t length,
                                                           const NbdContext::Visit& visit) -> Result<void> {
        length = std::min(length, most);
        bool enough = false;
        auto visited = image->each_dirty(bitmap, at, length, [&](const DirtyRun& run) -> Result<void> {
            enough = !visit({run.length, run.dirty ? nbd::state_dirty : 0});
            if (enough) return fail(Errc::limit_exceeded, "", "");
            return {};
        });
        return enough ? Result<void>() : visited;
    };
    return NbdContext{"qemu:dirty-bitmap:" + bitmap, std::move(status)};
}

}  // namespace

Result<NbdContext> dirty_bitmap_context(std::shared_ptr<Image> image, const std::string& bitmap) {
    return within_memory([&] { return bitmap_context(std::move(image), bitmap); });
}

}  // namespace qcow
