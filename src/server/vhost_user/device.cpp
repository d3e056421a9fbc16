#include "server/vhost_user/device.h"

#include <linux/virtio_config.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "base/bits.h"
#include "base/buffers.h"

namespace qcow::vhost_user {
namespace {

constexpr std::uint64_t sector_bytes = 512;

/// The guest had better write whole pages, whatever its logical block is.
constexpr std::uint64_t physical_block = 4096;

constexpr std::uint32_t max_segment_bytes = 1U << 20;

/// Ranges of a request that discards or makes zeros, and the sectors of each: they bound how long it takes.
constexpr std::uint32_t max_ranges = 32;
constexpr std::uint32_t max_range_sectors = 1U << 22;

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

/// Numbers in requests and in the configuration space are little-endian.
template <class T>
T little_endian(T value) {
    if constexpr (std::endian::native == std::endian::big) return std::byteswap(value);
    return value;
}

}  // namespace

Device::Device(std::shared_ptr<Disk> disk, VhostUserOptions options)
    : disk_(std::move(disk)), options_(std::move(options)) {}

std::uint64_t Device::features() const {
    auto features = bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_INDIRECT_DESC) | bit(VIRTIO_RING_F_EVENT_IDX) |
                    bit(VIRTIO_BLK_F_SIZE_MAX) | bit(VIRTIO_BLK_F_SEG_MAX) | bit(VIRTIO_BLK_F_BLK_SIZE) |
                    bit(VIRTIO_BLK_F_TOPOLOGY) | bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE) |
                    bit(VIRTIO_BLK_F_MQ);
    if (options_.read_only) {
        features |= bit(VIRTIO_BLK_F_RO);
    } else {
        features |= bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
    }
    return features;
}

void Device::accept(std::uint64_t features) {
    // What a driver has chosen since it accepted the features stays when they are accepted again, as at the beginning
    // of a migration.
    if ((features & bit(VIRTIO_BLK_F_FLUSH)) == 0) write_back_ = true;
    accepted_ = features;
}

virtio_blk_config Device::configuration() const {
    const auto blocks = [&](std::uint64_t bytes) { return bytes / options_.block_size; };
    const auto cluster = std::clamp<std::uint64_t>(disk_->block_size(), physical_block, 2 * MiB);
    virtio_blk_config config = {};
    config.capacity = little_endian<std::uint64_t>(disk_->size() / sector_bytes);
    config.size_max = little_endian(max_segment_bytes);
    config.seg_max = little_endian(options_.queue_size - 2);
    config.blk_size = little_endian(options_.block_size);
    config.physical_block_exp = static_cast<std::uint8_t>(std::countr_zero(blocks(physical_block)));
    config.min_io_size = little_endian(static_cast<std::uint16_t>(blocks(physical_block)));
    config.opt_io_size = little_endian(static_cast<std::uint32_t>(blocks(cluster)));
    config.wce = write_back_ ? 1 : 0;
    config.num_queues = little_endian(static_cast<std::uint16_t>(options_.queues));
    if (options_.read_only) return config;
    config.max_discard_sectors = little_endian(max_range_sectors);
    config.max_discard_seg = little_endian(max_ranges);
    config.discard_sector_alignment = little_endian(static_cast<std::uint32_t>(cluster / sector_bytes));
    config.max_write_zeroes_sectors = little_endian(max_range_sectors);
    config.max_write_zeroes_seg = little_endian(max_ranges);
    config.write_zeroes_may_unmap = 1;
    return config;
}

Result<void> Device::write_configuration(std::size_t at, std::span<const std::byte> bytes) {
    const bool is_cache_mode = at == offsetof(virtio_blk_config, wce) && bytes.size() == 1;
    if (!is_cache_mode || (accepted_ & bit(VIRTIO_BLK_F_CONFIG_WCE)) == 0)
        return fail(Errc::read_only, "configuration space", "only the mode of the cache can be changed");
    set_write_back(bytes[0] != std::byte{0});
    return {};
}

BlockRequest Device::parse(const Chain& chain) {
    BlockRequest request;
    const ConstBuffers readable{std::span(chain.readable)};
    const Buffers writable{std::span(chain.writable)};
    if (!writable.empty()) {
        const auto last = std::ranges::find_if(chain.writable.rbegin(), chain.writable.rend(),
                                               [](const auto& piece) { return !piece.empty(); });
        request.status = &last->back();
        request.to = writable.first(writable.size() - 1);
    }
    virtio_blk_outhdr header = {};
    if (readable.size() < sizeof header) return request;
    gather(readable.first(sizeof header), std::as_writable_bytes(std::span(&header, 1)));
    request.type = little_endian(header.type);
    request.sector = little_endian(header.sector);
    request.from = readable.subspan(sizeof header);
    request.sound = true;
    return request;
}

Work Device::kind_of(const BlockRequest& request) {
    switch (request.type) {
        case VIRTIO_BLK_T_IN: return Work::read;
        case VIRTIO_BLK_T_OUT: return Work::write;
        case VIRTIO_BLK_T_FLUSH: return Work::flush;
        case VIRTIO_BLK_T_DISCARD:
        case VIRTIO_BLK_T_WRITE_ZEROES: return Work::unmap;
        default: return Work::query;
    }
}

std::uint32_t Device::perform(const BlockRequest& request, const GuestMemory& memory) const {
    // Without a place for the status there is nothing to say, and so nothing is done.
    if (request.status == nullptr) return 0;
    const auto losses = memory.losses();
    auto status = request.sound ? execute(request) : std::uint8_t{VIRTIO_BLK_S_IOERR};
    if (memory.losses() != losses) status = VIRTIO_BLK_S_IOERR;
    *request.status = std::byte{status};
    std::uint32_t written = 1;
    const bool fills = request.type == VIRTIO_BLK_T_IN || request.type == VIRTIO_BLK_T_GET_ID;
    if (fills && status == VIRTIO_BLK_S_OK) {
        written += static_cast<std::uint32_t>(request.to.size());
        for (const auto piece : request.to) memory.note_changed(piece);
    }
    memory.note_changed(std::span(request.status, 1));
    return written;
}

std::uint8_t Device::execute(const BlockRequest& request) const {
    switch (request.type) {
        case VIRTIO_BLK_T_IN: return read(request);
        case VIRTIO_BLK_T_OUT: return write(request);
        case VIRTIO_BLK_T_FLUSH: return options_.read_only ? std::uint8_t{VIRTIO_BLK_S_OK} : status_of(disk_->flush());
        case VIRTIO_BLK_T_GET_ID: return identify(request);
        case VIRTIO_BLK_T_DISCARD:
        case VIRTIO_BLK_T_WRITE_ZEROES: return unmap(request);
        default: return VIRTIO_BLK_S_UNSUPP;
    }
}

/// Whether a range is one of the disk's, in whole blocks.
bool Device::is_valid(std::uint64_t sector, std::uint64_t bytes) const {
    const auto capacity = disk_->size() / sector_bytes;
    if (sector > capacity || bytes > (capacity - sector) * sector_bytes) return false;
    return (sector * sector_bytes | bytes) % options_.block_size == 0;
}

std::uint8_t Device::read(const BlockRequest& request) const {
    if (!is_valid(request.sector, request.to.size())) return VIRTIO_BLK_S_IOERR;
    return status_of(disk_->read({request.sector * sector_bytes}, request.to));
}

std::uint8_t Device::write(const BlockRequest& request) const {
    if (options_.read_only || !is_valid(request.sector, request.from.size())) return VIRTIO_BLK_S_IOERR;
    return end_of_change(disk_->write({request.sector * sector_bytes}, request.from));
}

std::uint8_t Device::end_of_change(Result<void> result) const {
    // A driver that cannot flush relies on each write.
    const bool flushes = (accepted_ & bit(VIRTIO_BLK_F_FLUSH)) != 0;
    if (result && !(write_back_ && flushes)) result = disk_->flush();
    return status_of(result);
}

/// The driver learns only that there is an error. What it is, is said once for each kind.
std::uint8_t Device::status_of(const Result<void>& result) const {
    if (result) return VIRTIO_BLK_S_OK;
    const auto kind = bit(static_cast<unsigned>(result.error().code));
    if ((said_.fetch_or(kind) & kind) == 0 && options_.complain) options_.complain(result.error().message());
    return VIRTIO_BLK_S_IOERR;
}

std::uint8_t Device::unmap(const BlockRequest& request) const {
    std::array<virtio_blk_discard_write_zeroes, max_ranges> ranges = {};
    const auto count = request.from.size() / sizeof ranges[0];
    if (options_.read_only || count == 0 || count > max_ranges || request.from.size() % sizeof ranges[0] != 0)
        return VIRTIO_BLK_S_IOERR;
    gather(request.from, std::as_writable_bytes(std::span(ranges)));
    const bool discards = request.type == VIRTIO_BLK_T_DISCARD;
    Result<void> result;
    for (const auto& range : std::span(ranges).first(count)) {
        const auto sector = little_endian(range.sector);
        const auto sectors = little_endian(range.num_sectors);
        const auto flags = little_endian(range.flags);
        const auto known = discards ? std::uint32_t{0} : std::uint32_t{VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP};
        if ((flags & ~known) != 0) return VIRTIO_BLK_S_UNSUPP;
        const auto bytes = sectors * sector_bytes;
        if (sectors > max_range_sectors || !is_valid(sector, bytes)) return VIRTIO_BLK_S_IOERR;
        const GuestOffset at = {sector * sector_bytes};
        const auto how = flags != 0 ? Disk::Zeroes::release : Disk::Zeroes::keep;
        result = discards ? disk_->discard(at, bytes) : disk_->write_zeroes(at, bytes, how);
        if (!result) break;
    }
    return end_of_change(std::move(result));
}

std::uint8_t Device::identify(const BlockRequest& request) const {
    std::array<std::byte, VIRTIO_BLK_ID_BYTES> id = {};
    std::memcpy(id.data(), options_.serial.data(), std::min(options_.serial.size(), id.size()));
    if (request.to.size() < id.size()) return VIRTIO_BLK_S_IOERR;
    fill_zeros(request.to);
    scatter(id, request.to);
    return VIRTIO_BLK_S_OK;
}

}  // namespace qcow::vhost_user
