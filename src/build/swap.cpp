#include "build/swap.h"

#include <algorithm>

#include "base/bits.h"
#include "filesystem/little_endian.h"

namespace qcow {
namespace {

constexpr std::uint64_t page = 4 * KiB;
constexpr std::uint64_t fewest_pages = 10;
constexpr std::size_t label_bytes = 16;

}  // namespace

Result<Filled> write_swap(const Volume& volume, PlannedDisk& disk, std::uint64_t offset, std::uint64_t size) {
    if (volume.spec.label.size() > label_bytes)
        return fail(Errc::invalid_argument, volume.at("label"), "the label is longer than the 16 bytes that swap has");
    if (!volume.spec.options.empty()) return fail(Errc::invalid_argument, volume.at("options"), "swap has no options");
    const auto pages = std::min<std::uint64_t>(size / page, 0xffffffff);
    if (pages < fewest_pages) return does_not_fit(volume, fewest_pages * page, size);
    std::vector<std::byte> header(page);
    store_le<std::uint32_t>(header, 1024, 1);  // version
    store_le(header, 1028, static_cast<std::uint32_t>(pages - 1));
    for (std::size_t i = 0; i < volume.uuid.size(); ++i) header[1036 + i] = std::byte{volume.uuid[i]};
    std::ranges::copy(as_bytes(volume.spec.label), header.begin() + 1052);
    std::ranges::copy(as_bytes("SWAPSPACE2"), header.end() - 10);
    TRY_VOID(disk.write({offset}, header));
    return Filled{.files = 0, .free = (pages - 1) * page};
}

}  // namespace qcow
