#pragma once
// The messages of the vhost-user protocol, in the byte order of the machine.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/try.h"
#include "server/vhost_user/guest_memory.h"
#include "storage/file.h"

namespace qcow::vhost_user {

enum class Request : std::uint32_t {
    get_features = 1,
    set_features = 2,
    set_owner = 3,
    reset_owner = 4,
    set_mem_table = 5,
    set_log_base = 6,
    set_log_fd = 7,
    set_vring_num = 8,
    set_vring_addr = 9,
    set_vring_base = 10,
    get_vring_base = 11,
    set_vring_kick = 12,
    set_vring_call = 13,
    set_vring_err = 14,
    get_protocol_features = 15,
    set_protocol_features = 16,
    get_queue_num = 17,
    set_vring_enable = 18,
    set_backend_req_fd = 21,
    get_config = 24,
    set_config = 25,
    get_inflight_fd = 31,
    set_inflight_fd = 32,
    reset_device = 34,
    get_max_mem_slots = 36,
    add_mem_reg = 37,
    rem_mem_reg = 38,
    set_status = 39,
    get_status = 40,
};

/// What the back end sends by itself: the configuration space has changed.
constexpr std::uint32_t config_change = 2;

// Bits of the features that are the protocol's.
constexpr std::uint64_t log_all = std::uint64_t{1} << 26;
constexpr std::uint64_t has_protocol_features = std::uint64_t{1} << 30;

namespace protocol {
constexpr std::uint64_t mq = 1U << 0;
constexpr std::uint64_t log_shmfd = 1U << 1;
constexpr std::uint64_t reply_ack = 1U << 3;
constexpr std::uint64_t backend_req = 1U << 5;
constexpr std::uint64_t config = 1U << 9;
constexpr std::uint64_t inflight_shmfd = 1U << 12;
constexpr std::uint64_t reset_device = 1U << 13;
constexpr std::uint64_t configure_mem_slots = 1U << 15;
constexpr std::uint64_t status = 1U << 16;
}  // namespace protocol

// Flags of a message.
constexpr std::uint32_t version_mask = 3;
constexpr std::uint32_t version_1 = 1;
constexpr std::uint32_t is_reply = 1U << 2;
constexpr std::uint32_t wants_reply = 1U << 3;

constexpr std::uint64_t no_descriptor = 1U << 8;   // of set_vring_kick, _call and _err
constexpr std::uint32_t ring_is_logged = 1U << 0;  // of set_vring_addr

struct Header {
    std::uint32_t request = 0;
    std::uint32_t flags = 0;
    std::uint32_t size = 0;  // bytes of the payload
};

// Payloads.

struct QueueNumber {
    std::uint32_t queue = 0;
    std::uint32_t number = 0;
};

struct QueueAddresses {
    std::uint32_t queue = 0;
    std::uint32_t flags = 0;
    std::uint64_t descriptors = 0;
    std::uint64_t used = 0;
    std::uint64_t available = 0;
    std::uint64_t log = 0;
};

struct MemoryTable {
    std::uint32_t count = 0;
    std::uint32_t padding = 0;
    std::array<RegionDescription, 8> regions = {};
};

struct MemoryRegion {
    std::uint64_t padding = 0;
    RegionDescription region = {};
};

struct LogPlace {
    std::uint64_t size = 0;
    std::uint64_t offset = 0;
};

struct ConfigurationPart {
    std::uint32_t offset = 0;
    std::uint32_t size = 0;
    std::uint32_t flags = 0;
    std::array<std::byte, 256> bytes = {};
};
constexpr std::uint32_t configuration_head = offsetof(ConfigurationPart, bytes);

struct InflightPlace {
    std::uint64_t size = 0;
    std::uint64_t offset = 0;
    std::uint16_t queues = 0;
    std::uint16_t queue_size = 0;
    std::uint32_t padding = 0;
};
constexpr std::uint32_t inflight_bytes = offsetof(InflightPlace, padding);  // some front ends send the padding, too

/// Bytes of the largest payload.
constexpr std::size_t max_payload = 512;

/// A message that has arrived.
struct Message {
    Header header;
    std::vector<std::byte> payload;
    std::vector<FileDescriptor> descriptors;
};

/// Waits for a message. None: the front end has left. Errors: Errc::corrupt: it is not a message; Errc::io.
Result<std::optional<Message>> receive(int socket);

/// Sends a message. `descriptor` -1: without one. Errors: Errc::io.
Result<void> send(int socket, Header header, std::span<const std::byte> payload, int descriptor = -1);

}  // namespace qcow::vhost_user
