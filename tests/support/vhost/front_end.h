#pragma once
// The driver's side of vhost-user-blk, without a guest. It connects to a server's socket, shares memory with the server
// and drives its queues. Tests and benchmarks use it with any server of the protocol.
//
//     FrontEnd front(socket, {.queues = 2});
//     front.start();
//     front.write(0, bytes);                                             // one request, and its status
//     const auto token = front.queue(1).submit(VIRTIO_BLK_T_IN, 8, segments);  // many at once
//     front.queue(1).publish();
//     const auto completion = front.queue(1).wait();
//
// Errors are exceptions: Disconnected if the server closed the connection, Refused if it answered a message with an
// error, std::runtime_error for everything else. A status of a request is a result, never an exception.
//
// Thread safety: one thread per Queue; everything else in one thread.

#define VIRTIO_RING_NO_LEGACY  // without a function that is not C++

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace qcow::front {

using Bytes = std::vector<std::byte>;
using std::chrono::milliseconds;

inline constexpr std::uint64_t page_bytes = 4096;
inline constexpr milliseconds patience{10'000};

struct Disconnected : std::runtime_error {
    Disconnected() : std::runtime_error("the server closed the connection") {}
};
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

/// Bits of the virtio features.
namespace feature {
inline constexpr std::uint64_t size_max = bit(1), seg_max = bit(2), read_only = bit(5), blk_size = bit(6),
                               flush = bit(9), topology = bit(10), config_wce = bit(11), mq = bit(12),
                               discard = bit(13), write_zeroes = bit(14), log_all = bit(26), indirect = bit(28),
                               event_idx = bit(29), protocol_features = bit(30), version_1 = bit(32),
                               ring_packed = bit(34);
/// The features that the front end asks for, where the server offers them. log_all is only set while a log is in use.
inline constexpr std::uint64_t known = size_max | seg_max | read_only | blk_size | flush | topology | config_wce | mq |
                                       discard | write_zeroes | indirect | event_idx | protocol_features | version_1;
}  // namespace feature

/// Bits of the protocol features.
namespace protocol {
inline constexpr std::uint64_t mq = bit(0), log_shmfd = bit(1), reply_ack = bit(3), backend_req = bit(5),
                               config = bit(9), inflight_shmfd = bit(12), reset_device = bit(13),
                               configure_mem_slots = bit(15), status = bit(16);
inline constexpr std::uint64_t known =
    mq | log_shmfd | reply_ack | backend_req | config | inflight_shmfd | reset_device | configure_mem_slots | status;
}  // namespace protocol

enum class Message : std::uint32_t {
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

/// An owned file descriptor.
class Fd {
public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd& operator=(Fd&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Fd();
    [[nodiscard]] int get() const { return fd_; }

private:
    int fd_ = -1;
};

/// Memory of a file that is shared with the server.
class Mapping {
public:
    Mapping() = default;
    /// Maps the beginning of a file.
    Mapping(const Fd& file, std::uint64_t size);
    /// Reserves addresses, without memory.
    explicit Mapping(std::uint64_t size);
    Mapping(Mapping&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
    Mapping& operator=(Mapping&& other) noexcept {
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Mapping();
    [[nodiscard]] std::span<std::byte> bytes() const { return bytes_; }

private:
    std::span<std::byte> bytes_;
};

/// A new memory file.
Fd memory_file(std::uint64_t size);

// ---- Messages ----

struct Header {
    Message message = {};
    std::uint32_t flags = 0;  ///< version, reply, need_reply
    std::uint32_t size = 0;   ///< of the payload, in bytes
};
inline constexpr std::uint32_t version_flag = 1, reply_flag = 4, need_reply_flag = 8;

struct VringState {
    std::uint32_t index = 0;
    std::uint32_t num = 0;
};
struct VringAddress {
    std::uint32_t index = 0;
    std::uint32_t flags = 0;                                 ///< 1: log writes to the used ring
    std::uint64_t descriptors = 0, used = 0, available = 0;  ///< user addresses
    std::uint64_t log = 0;                                   ///< guest address of the used ring, for the log
};
struct MemoryRegion {
    std::uint64_t guest = 0, size = 0, user = 0, offset = 0;
};
struct InflightArea {
    std::uint64_t size = 0, offset = 0;
    std::uint16_t queues = 0, queue_size = 0;
};
struct ConfigHeader {
    std::uint32_t offset = 0, size = 0, flags = 0;
};

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    return std::as_bytes(std::span(&value, 1));
}
template <class... T>
Bytes payload(const T&... parts) {
    Bytes result;
    (result.insert(result.end(), bytes_of(parts).begin(), bytes_of(parts).end()), ...);
    return result;
}

struct Received {
    Header header;
    Bytes payload;
    std::vector<Fd> fds;

    template <class T>
    [[nodiscard]] T as() const {
        T value{};
        if (payload.size() < sizeof(T)) throw std::runtime_error("a reply is too short");
        std::memcpy(&value, payload.data(), sizeof(T));
        return value;
    }
};

/// The socket. It sends any message, also wrong ones.
class Connection {
public:
    /// Connects. Waits for a server that has not started yet.
    explicit Connection(const std::string& socket, milliseconds timeout = patience);

    void send(Message message, std::span<const std::byte> payload = {}, std::span<const int> fds = {},
              std::uint32_t flags = version_flag) const;
    /// Sends bytes and descriptors as they are.
    void send_raw(std::span<const std::byte> bytes, std::span<const int> fds = {}) const;

    [[nodiscard]] Received receive(milliseconds timeout = patience) const;

    /// Sends a message that has a reply of its own, and returns the reply.
    [[nodiscard]] Received ask(Message message, std::span<const std::byte> payload = {},
                               std::span<const int> fds = {}) const;
    [[nodiscard]] std::uint64_t ask_number(Message message) const { return ask(message).as<std::uint64_t>(); }

    /// Whether the server closes the connection in this time. Skips replies.
    [[nodiscard]] bool is_closed(milliseconds timeout = patience) const;

    [[nodiscard]] int fd() const { return fd_.get(); }

private:
    Fd fd_;
};

// ---- Memory ----

/// What the guest would have as its memory: regions of shared memory files. Their guest addresses follow each other
/// without gaps, and so do their addresses here. Each region has a file of its own.
class GuestMemory {
public:
    struct Region : MemoryRegion {
        Fd file;
    };

    /// Sizes are multiples of page_bytes.
    explicit GuestMemory(const std::vector<std::uint64_t>& sizes);
    GuestMemory(const GuestMemory&) = delete;
    GuestMemory& operator=(const GuestMemory&) = delete;

    /// Guest address of memory that nothing else uses. It stays in use.
    std::uint64_t allocate(std::uint64_t size, std::uint64_t alignment = 16);

    /// The first address behind the memory.
    [[nodiscard]] std::uint64_t end() const { return first_ + size_; }

    [[nodiscard]] std::byte* at(std::uint64_t guest) const { return base_ + (guest - first_); }
    [[nodiscard]] std::span<std::byte> bytes(std::uint64_t guest, std::uint64_t length) const {
        return {at(guest), length};
    }
    /// The user address: where the front end itself has this memory.
    [[nodiscard]] std::uint64_t user(std::uint64_t guest) const { return reinterpret_cast<std::uint64_t>(at(guest)); }

    [[nodiscard]] const std::vector<Region>& regions() const { return regions_; }

private:
    Mapping mapping_;
    std::byte* base_ = nullptr;
    std::uint64_t first_ = 0;
    std::uint64_t size_ = 0;
    std::uint64_t free_ = 0;
    std::vector<Region> regions_;
};

// ---- Queues ----

struct Segment {
    std::uint64_t address = 0;  ///< guest address
    std::uint32_t length = 0;
};

using Token = std::uint16_t;

struct Completion {
    Token token = 0;
    std::uint8_t status = 0xff;  ///< VIRTIO_BLK_S_*, or 0xff if the server wrote none
    std::uint32_t written = 0;   ///< bytes that the server says it wrote
};

/// A split ring with requests on it.
class Queue {
public:
    /// With room for `size` requests of `most_segments` data segments each.
    Queue(GuestMemory& memory, std::uint16_t size, unsigned most_segments);

    /// Adds a request. The segments hold data that the server writes if type is IN or GET_ID, else data that it reads.
    /// The server sees it after publish(). Returns nothing if the queue has no room.
    std::optional<Token> submit(std::uint32_t type, std::uint64_t sector, std::span<const Segment> segments);

    /// Shows the server what was submitted, and kicks it if it asks for that.
    void publish();

    /// The next request that the server has completed, if there is one.
    std::optional<Completion> poll();

    /// Waits for it: sleeps until the server calls. Throws Disconnected when the server goes away.
    Completion wait(milliseconds timeout = patience);

    [[nodiscard]] std::uint16_t size() const { return size_; }
    [[nodiscard]] std::uint64_t kicks() const { return kicks_; }
    [[nodiscard]] std::uint64_t sleeps() const { return sleeps_; }
    [[nodiscard]] unsigned in_flight() const { return in_flight_; }

    // Raw access, for what no honest driver does.

    [[nodiscard]] vring_desc& descriptor(unsigned index) { return descriptors_[index]; }
    [[nodiscard]] vring_avail& available() { return *available_; }
    [[nodiscard]] vring_used& used() { return *used_; }
    [[nodiscard]] std::uint64_t descriptors_address() const { return descriptors_address_; }
    [[nodiscard]] std::uint64_t available_address() const { return available_address_; }
    [[nodiscard]] std::uint64_t used_address() const { return used_address_; }
    [[nodiscard]] std::uint64_t used_bytes() const { return 6 + 8 * std::uint64_t{size_}; }
    [[nodiscard]] std::uint16_t used_index() const;
    /// How far the front end has taken completions.
    [[nodiscard]] std::uint16_t next_used() const { return next_used_; }
    /// Makes the chain that begins at descriptor `head` available, and kicks.
    void push(std::uint16_t head);
    /// Takes the next entry of the used ring, if there is one in time.
    std::optional<vring_used_elem> pop(milliseconds timeout);
    void kick();
    /// Whether the server says in this time that the queue has failed.
    [[nodiscard]] bool wait_for_error(milliseconds timeout) const;
    /// Empties the rings, as a driver does when it starts the device afresh.
    void reset();

private:
    friend class FrontEnd;

    struct Slot {
        std::uint64_t header = 0;  ///< guest addresses
        std::uint64_t status = 0;
        std::uint64_t table = 0;
        std::uint16_t head = 0;
        std::uint16_t count = 0;
    };
    void use(std::uint64_t features, int connection) {
        features_ = features;
        connection_ = connection;
    }
    [[nodiscard]] bool has(std::uint64_t feature) const { return (features_ & feature) != 0; }
    void ask_for_calls(bool wanted);
    [[nodiscard]] bool wants_kick(std::uint16_t from, std::uint16_t to) const;
    std::optional<vring_used_elem> take();

    GuestMemory& memory_;
    std::uint16_t size_;
    unsigned most_segments_;
    std::uint64_t features_ = 0;
    int connection_ = -1;
    std::uint64_t descriptors_address_, available_address_, used_address_;
    vring_desc* descriptors_;
    vring_avail* available_;
    vring_used* used_;
    std::uint16_t* call_index_;         ///< the server calls when it passes this index of the used ring
    const std::uint16_t* kick_index_;   ///< the server wants a kick when the available ring passes this index
    std::uint16_t next_available_ = 0;  ///< what was submitted
    std::uint16_t published_ = 0;
    std::uint16_t next_used_ = 0;
    std::vector<std::uint16_t> free_descriptors_;
    std::vector<Slot> slots_;
    std::vector<Token> free_slots_;
    std::vector<Token> slot_of_head_;
    unsigned in_flight_ = 0;
    Fd kick_fd_, call_fd_, error_fd_;
    std::uint64_t kicks_ = 0, sleeps_ = 0;
};

// ---- The front end ----

struct Options {
    std::uint64_t features = feature::known;            ///< features that it accepts
    std::uint64_t protocol_features = protocol::known;  ///< protocol features that it accepts
    unsigned queues = 1;
    std::uint16_t queue_size = 128;
    unsigned most_segments = 126;
    std::vector<std::uint64_t> regions = {std::uint64_t{32} << 20};  ///< sizes of the memory regions
    bool regions_one_by_one = true;  ///< ADD_MEM_REG where the server has it, else SET_MEM_TABLE
};

class FrontEnd {
public:
    /// Connects, negotiates and shares memory. start() starts the queues.
    explicit FrontEnd(std::string socket, const Options& options = {});

    /// Starts all queues.
    void start();
    void start_queue(unsigned index);
    /// Stops a queue. Returns the index in the available ring where the server would go on.
    std::uint16_t stop_queue(unsigned index);

    /// Connects again after the server or the connection has gone. Memory, rings and the record of requests in flight
    /// are the same as before, and the queues are started. The server completes what was in flight.
    void reconnect(milliseconds timeout = patience);

    [[nodiscard]] std::uint64_t offered_features() const { return offered_features_; }
    [[nodiscard]] std::uint64_t offered_protocol_features() const { return offered_protocol_features_; }
    [[nodiscard]] bool has(std::uint64_t feature) const { return (features_ & feature) != 0; }
    [[nodiscard]] bool has_protocol(std::uint64_t feature) const { return (protocol_features_ & feature) != 0; }

    [[nodiscard]] GuestMemory& memory() { return *memory_; }
    [[nodiscard]] Queue& queue(unsigned index) { return *queues_[index]; }
    [[nodiscard]] unsigned queues() const { return static_cast<unsigned>(queues_.size()); }
    [[nodiscard]] Connection& connection() { return *connection_; }

    /// Sends a message without a reply of its own. Waits for the acknowledgement if REPLY_ACK was negotiated.
    void set(Message message, std::span<const std::byte> payload = {}, std::span<const int> fds = {});

    [[nodiscard]] virtio_blk_config config() const;
    /// Writes bytes of the configuration space.
    void set_config(std::uint32_t offset, std::span<const std::byte> bytes);
    void set_writeback(bool writeback);
    [[nodiscard]] std::uint64_t queue_limit() const { return connection_->ask_number(Message::get_queue_num); }

    /// Whether the server says in this time that the configuration has changed. Answers it.
    bool wait_for_config_change(milliseconds timeout = patience);

    /// Gives the server a log of dirty pages of guest memory, and tells it to use the log from now on.
    void start_log();
    void stop_log();
    [[nodiscard]] bool is_dirty(std::uint64_t guest) const;
    void clear_log();

    // One request on a queue, and its status.

    std::uint8_t read(std::uint64_t sector, std::span<std::byte> to, unsigned queue = 0);
    std::uint8_t write(std::uint64_t sector, std::span<const std::byte> from, unsigned queue = 0);
    std::uint8_t flush(unsigned queue = 0);
    /// DISCARD or WRITE_ZEROES of these ranges.
    std::uint8_t clear(std::uint32_t type, std::span<const virtio_blk_discard_write_zeroes> ranges, unsigned queue = 0);
    std::uint8_t request(std::uint32_t type, std::uint64_t sector, std::span<const Segment> segments,
                         unsigned queue = 0);

    /// Guest memory for data of those requests, 1 MiB at most.
    [[nodiscard]] std::uint64_t scratch() const { return scratch_; }
    static constexpr std::uint64_t scratch_bytes = std::uint64_t{1} << 20;

private:
    void negotiate();
    void share_memory();
    void share_inflight();
    void send_ring_address(unsigned index);
    void send_fd(Message message, unsigned index, const Fd& fd);

    std::string socket_;
    Options options_;
    std::unique_ptr<GuestMemory> memory_;
    std::vector<std::unique_ptr<Queue>> queues_;
    std::unique_ptr<Connection> connection_;
    Fd backend_channel_;
    std::uint64_t offered_features_ = 0, features_ = 0;
    std::uint64_t offered_protocol_features_ = 0, protocol_features_ = 0;
    Fd inflight_;
    InflightArea inflight_area_;
    Fd log_, log_signal_;
    Mapping log_bytes_;
    bool logging_ = false;
    std::uint64_t scratch_ = 0;
};

}  // namespace qcow::front
