#pragma once
// The virtio block device (virtio 1.2, section 5.2): what its queues share.

#include <linux/virtio_blk.h>

#include <atomic>
#include <memory>
#include <string>

#include "qcow/vhost_user.h"
#include "server/vhost_user/split_ring.h"

namespace qcow::vhost_user {

/// What a request does, as far as it decides how long it takes.
enum class Work : std::uint8_t { read, write, flush, unmap, query };
constexpr std::size_t kinds_of_work = 5;

/// A request, and where its parts lie.
struct BlockRequest {
    std::uint32_t type = 0;
    std::uint64_t sector = 0;
    ConstBuffers from;            // without the header
    Buffers to;                   // without the status
    std::byte* status = nullptr;  // nullptr: there is no place for it
    bool sound = false;           // whether there is a header
};

/// Executes requests on a disk.
///
/// Thread safety: perform(), configuration() and write_configuration() may be called from any number of threads.
class Device {
public:
    Device(std::shared_ptr<Disk> disk, VhostUserOptions options);

    /// The features of a block device and of its rings, as bits.
    [[nodiscard]] std::uint64_t features() const;

    /// Takes over what the driver has accepted of them.
    void accept(std::uint64_t features);

    /// Returns the configuration space.
    [[nodiscard]] virtio_blk_config configuration() const;

    /// Changes a byte of the configuration space. Errors: Errc::read_only for all but the mode of the cache.
    Result<void> write_configuration(std::size_t at, std::span<const std::byte> bytes);

    /// The mode of the cache, which is write-back until the driver changes it or is reset: it reads it before it
    /// accepts any feature. Otherwise each write is flushed.
    [[nodiscard]] bool write_back() const { return write_back_; }
    void set_write_back(bool write_back) { write_back_ = write_back; }

    /// See Disk::survive_in.
    Result<void> survive_in(SurvivingMemory memory) const { return disk_->survive_in(std::move(memory)); }

    /// Finds the parts of a request. The chain must outlive the result.
    [[nodiscard]] static BlockRequest parse(const Chain& chain);
    [[nodiscard]] static Work kind_of(const BlockRequest& request);

    /// Executes a request, and writes its status. Returns the bytes that were written into the guest's memory.
    std::uint32_t perform(const BlockRequest& request, const GuestMemory& memory) const;

private:
    [[nodiscard]] std::uint8_t execute(const BlockRequest& request) const;
    [[nodiscard]] std::uint8_t read(const BlockRequest& request) const;
    [[nodiscard]] std::uint8_t write(const BlockRequest& request) const;
    [[nodiscard]] std::uint8_t unmap(const BlockRequest& request) const;
    [[nodiscard]] std::uint8_t identify(const BlockRequest& request) const;
    [[nodiscard]] std::uint8_t end_of_change(Result<void> result) const;
    [[nodiscard]] std::uint8_t status_of(const Result<void>& result) const;
    [[nodiscard]] bool is_valid(std::uint64_t sector, std::uint64_t bytes) const;

    std::shared_ptr<Disk> disk_;
    VhostUserOptions options_;
    std::atomic<bool> write_back_ = true;
    std::atomic<std::uint64_t> accepted_ = 0;
    mutable std::atomic<std::uint64_t> said_ = 0;  // kinds of errors, as bits
};

}  // namespace qcow::vhost_user
