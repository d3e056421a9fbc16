#include "support/vhost/front_end.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <thread>

namespace qcow::front {

namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

/// Waits until one of these can be read, or has been hung up. Returns which ones.
template <std::size_t n>
std::array<bool, n> wait_readable(const std::array<int, n>& fds, milliseconds timeout) {
    std::array<pollfd, n> polled;
    for (std::size_t i = 0; i < n; ++i) polled[i] = {fds[i], POLLIN, 0};
    const auto deadline = Clock::now() + timeout;
    for (;;) {
        const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now()).count();
        const int ready = ::poll(polled.data(), n, static_cast<int>(std::max<std::int64_t>(left, 0)));
        if (ready < 0 && errno == EINTR) continue;
        if (ready < 0) fail("poll");
        std::array<bool, n> result;
        for (std::size_t i = 0; i < n; ++i) result[i] = polled[i].revents != 0;
        return result;
    }
}

bool is_readable(int fd, milliseconds timeout) { return wait_readable(std::array{fd}, timeout)[0]; }

void drain(const Fd& event) {
    eventfd_t value = 0;
    eventfd_read(event.get(), &value);
}

Fd event() { return Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); }

// Rings are shared with the server: each of their numbers is read and written at once.
template <class T>
T load(const T& from) {
    return std::atomic_ref(const_cast<T&>(from)).load();
}
template <class T>
void store(T& to, std::type_identity_t<T> value) {
    std::atomic_ref(to).store(value);
}

}  // namespace

Fd::~Fd() {
    if (fd_ >= 0) close(fd_);
}

namespace {

std::span<std::byte> map(std::byte* where, std::uint64_t size, int protection, int flags, int file, std::uint64_t at) {
    void* mapped = mmap(where, size, protection, flags, file, static_cast<off_t>(at));
    if (mapped == MAP_FAILED) fail("mmap");
    return {static_cast<std::byte*>(mapped), size};
}

}  // namespace

Mapping::Mapping(const Fd& file, std::uint64_t size)
    : bytes_(map(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0)) {}

Mapping::Mapping(std::uint64_t size)
    : bytes_(map(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}

Mapping::~Mapping() {
    if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

Fd memory_file(std::uint64_t size) {
    Fd file(memfd_create("guest", MFD_CLOEXEC));
    if (file.get() < 0 || ftruncate(file.get(), static_cast<off_t>(size)) != 0) fail("memfd");
    return file;
}

// ---- Messages ----

Connection::Connection(const std::string& socket, milliseconds timeout) {
    sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
    if (socket.size() >= sizeof address.sun_path) throw std::runtime_error("the name of the socket is too long");
    socket.copy(address.sun_path, socket.size());
    const auto deadline = Clock::now() + timeout;
    for (;;) {
        fd_ = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        if (fd() < 0) fail("socket");
        if (connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return;
        if ((errno != ENOENT && errno != ECONNREFUSED) || Clock::now() > deadline) fail(socket);
        std::this_thread::sleep_for(milliseconds(2));
    }
}

void Connection::send(Message message, std::span<const std::byte> payload, std::span<const int> fds,
                      std::uint32_t flags) const {
    const Header header{message, flags, static_cast<std::uint32_t>(payload.size())};
    auto bytes = front::payload(header);
    bytes.insert(bytes.end(), payload.begin(), payload.end());
    send_raw(bytes, fds);
}

void Connection::send_raw(std::span<const std::byte> bytes, std::span<const int> fds) const {
    std::vector<std::byte> control(fds.empty() ? 0 : CMSG_SPACE(fds.size_bytes()));
    bool with_fds = !fds.empty();
    while (!bytes.empty() || with_fds) {
        iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        if (with_fds) {
            message.msg_control = control.data();
            message.msg_controllen = control.size();
            auto* head = CMSG_FIRSTHDR(&message);
            head->cmsg_level = SOL_SOCKET;
            head->cmsg_type = SCM_RIGHTS;
            head->cmsg_len = CMSG_LEN(fds.size_bytes());
            std::memcpy(CMSG_DATA(head), fds.data(), fds.size_bytes());
        }
        const auto sent = sendmsg(fd(), &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) throw Disconnected();
        if (sent < 0) fail("sendmsg");
        bytes = bytes.subspan(static_cast<std::size_t>(sent));
        with_fds = false;
    }
}

Received Connection::receive(milliseconds timeout) const {
    constexpr std::size_t most_fds = 16;
    Received result;
    std::array<std::byte, CMSG_SPACE(most_fds * sizeof(int))> control;
    const auto take = [&](std::byte* to, std::size_t count) {
        while (count > 0) {
            if (!is_readable(fd(), timeout)) throw std::runtime_error("the server does not answer a message");
            iovec part{to, count};
            msghdr message{};
            message.msg_iov = &part;
            message.msg_iovlen = 1;
            message.msg_control = control.data();
            message.msg_controllen = control.size();
            const auto got = recvmsg(fd(), &message, MSG_CMSG_CLOEXEC);
            if (got < 0 && errno == EINTR) continue;
            if (got == 0 || (got < 0 && errno == ECONNRESET)) throw Disconnected();
            if (got < 0) fail("recvmsg");
            for (auto* head = CMSG_FIRSTHDR(&message); head != nullptr; head = CMSG_NXTHDR(&message, head)) {
                if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
                for (std::size_t at = CMSG_LEN(0); at + sizeof(int) <= head->cmsg_len; at += sizeof(int)) {
                    int received = -1;
                    std::memcpy(&received, reinterpret_cast<const std::byte*>(head) + at, sizeof received);
                    result.fds.emplace_back(received);
                }
            }
            to += got;
            count -= static_cast<std::size_t>(got);
        }
    };
    take(reinterpret_cast<std::byte*>(&result.header), sizeof result.header);
    if (result.header.size > 65536) throw std::runtime_error("a reply is too long");
    result.payload.resize(result.header.size);
    take(result.payload.data(), result.payload.size());
    return result;
}

Received Connection::ask(Message message, std::span<const std::byte> payload, std::span<const int> fds) const {
    send(message, payload, fds);
    auto reply = receive();
    if (reply.header.message != message || reply.header.flags != (version_flag | reply_flag))
        throw std::runtime_error("not the reply to this message");
    return reply;
}

bool Connection::is_closed(milliseconds timeout) const try {
    const auto deadline = Clock::now() + timeout;
    while (is_readable(fd(), std::chrono::duration_cast<milliseconds>(deadline - Clock::now())))
        static_cast<void>(receive(milliseconds(1000)));
    return false;
} catch (const Disconnected&) {
    return true;
}

// ---- Memory ----

GuestMemory::GuestMemory(const std::vector<std::uint64_t>& sizes) : first_(std::uint64_t{1} << 20) {
    for (const auto size : sizes) size_ += size;
    mapping_ = Mapping(size_);
    base_ = mapping_.bytes().data();
    free_ = first_;
    auto guest = first_;
    for (const auto size : sizes) {
        Region region;
        region.guest = guest;
        region.size = size;
        region.user = user(guest);
        // The first region begins at the beginning of its file, the others do not.
        region.offset = regions_.size() * page_bytes;
        region.file = memory_file(region.offset + size);
        map(at(guest), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, region.file.get(), region.offset);
        regions_.push_back(std::move(region));
        guest += size;
    }
}

std::uint64_t GuestMemory::allocate(std::uint64_t size, std::uint64_t alignment) {
    const auto at = (free_ + alignment - 1) / alignment * alignment;
    if (at + size > end()) throw std::runtime_error("the guest memory is full");
    free_ = at + size;
    return at;
}

// ---- Queues ----

Queue::Queue(GuestMemory& memory, std::uint16_t size, unsigned most_segments)
    : memory_(memory),
      size_(size),
      most_segments_(most_segments),
      descriptors_address_(memory.allocate(sizeof(vring_desc) * size, page_bytes)),
      // Each ring has one number more than its own: the event index of the other side.
      available_address_(memory.allocate(6 + 2 * std::uint64_t{size}, page_bytes)),
      used_address_(memory.allocate(used_bytes(), page_bytes)),
      descriptors_(reinterpret_cast<vring_desc*>(memory.at(descriptors_address_))),
      available_(reinterpret_cast<vring_avail*>(memory.at(available_address_))),
      used_(reinterpret_cast<vring_used*>(memory.at(used_address_))),
      call_index_(reinterpret_cast<std::uint16_t*>(memory.at(available_address_ + 4 + 2 * std::uint64_t{size}))),
      kick_index_(reinterpret_cast<const std::uint16_t*>(memory.at(used_address_ + 4 + 8 * std::uint64_t{size}))),
      slots_(size),
      slot_of_head_(size),
      kick_fd_(event()),
      call_fd_(event()),
      error_fd_(event()) {
    constexpr std::uint64_t header_bytes = sizeof(virtio_blk_outhdr);
    for (auto& slot : slots_) {
        slot.header = memory.allocate(header_bytes);
        slot.status = memory.allocate(1);
        slot.table = memory.allocate(sizeof(vring_desc) * (most_segments + 2));
    }
    memory.allocate(0, page_bytes);
    reset();
}

void Queue::reset() {
    std::memset(descriptors_, 0, sizeof(vring_desc) * size_);
    std::memset(memory_.at(available_address_), 0, 6 + 2 * std::size_t{size_});
    std::memset(memory_.at(used_address_), 0, used_bytes());
    next_available_ = published_ = next_used_ = 0;
    free_descriptors_.clear();
    free_slots_.clear();
    for (std::uint16_t i = size_; i-- > 0;) {
        free_descriptors_.push_back(i);
        free_slots_.push_back(i);
    }
    in_flight_ = 0;
}

std::optional<Token> Queue::submit(std::uint32_t type, std::uint64_t sector, std::span<const Segment> segments) {
    const auto count = segments.size() + 2;
    const bool indirect = has(feature::indirect);
    if (segments.size() > most_segments_) throw std::runtime_error("a request has too many segments");
    if (free_slots_.empty() || free_descriptors_.size() < (indirect ? 1 : count)) return std::nullopt;
    const auto token = free_slots_.back();
    free_slots_.pop_back();
    auto& slot = slots_[token];
    const virtio_blk_outhdr header{type, 0, sector};
    std::memcpy(memory_.at(slot.header), &header, sizeof header);
    *memory_.at(slot.status) = std::byte{0xff};

    const auto data_flags =
        static_cast<std::uint16_t>(type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID ? VRING_DESC_F_WRITE : 0);
    // Calls put(index of part, descriptor without its link) for each part of the request.
    const auto parts = [&](const auto& put) {
        put(0, vring_desc{slot.header, sizeof header, 0, 0});
        std::size_t i = 1;
        for (const auto& segment : segments) put(i++, vring_desc{segment.address, segment.length, data_flags, 0});
        put(i, vring_desc{slot.status, 1, VRING_DESC_F_WRITE, 0});
    };
    slot.head = free_descriptors_.back();
    if (indirect) {
        auto* table = reinterpret_cast<vring_desc*>(memory_.at(slot.table));
        parts([&](std::size_t i, vring_desc part) {
            if (i + 1 < count) {
                part.flags |= VRING_DESC_F_NEXT;
                part.next = static_cast<std::uint16_t>(i + 1);
            }
            table[i] = part;
        });
        free_descriptors_.pop_back();
        descriptors_[slot.head] = {slot.table, static_cast<std::uint32_t>(sizeof(vring_desc) * count),
                                   VRING_DESC_F_INDIRECT, 0};
        slot.count = 1;
    } else {
        parts([&](std::size_t i, vring_desc part) {
            const auto index = free_descriptors_.back();
            free_descriptors_.pop_back();
            if (i + 1 < count) {
                part.flags |= VRING_DESC_F_NEXT;
                part.next = free_descriptors_.back();
            }
            descriptors_[index] = part;
        });
        slot.count = static_cast<std::uint16_t>(count);
    }
    slot_of_head_[slot.head] = token;
    store(available_->ring[next_available_++ % size_], slot.head);
    ++in_flight_;
    return token;
}

void Queue::publish() {
    if (published_ == next_available_) return;
    const auto from = std::exchange(published_, next_available_);
    store(available_->idx, next_available_);
    if (wants_kick(from, next_available_)) kick();
}

bool Queue::wants_kick(std::uint16_t from, std::uint16_t to) const {
    if (!has(feature::event_idx)) return (load(used_->flags) & VRING_USED_F_NO_NOTIFY) == 0;
    const auto wanted = load(*kick_index_);
    return static_cast<std::uint16_t>(to - wanted - 1) < static_cast<std::uint16_t>(to - from);
}

void Queue::kick() {
    ++kicks_;
    eventfd_write(kick_fd_.get(), 1);
}

bool Queue::wait_for_error(milliseconds timeout) const { return is_readable(error_fd_.get(), timeout); }

std::uint16_t Queue::used_index() const { return load(used_->idx); }

std::optional<vring_used_elem> Queue::take() {
    if (used_index() == next_used_) return std::nullopt;
    return used_->ring[next_used_++ % size_];
}

std::optional<Completion> Queue::poll() {
    const auto element = take();
    if (!element) return std::nullopt;
    if (element->id >= size_) throw std::runtime_error("the server completed a descriptor that does not exist");
    const auto token = slot_of_head_[element->id];
    auto& slot = slots_[token];
    if (slot.count == 0 || slot.head != element->id)
        throw std::runtime_error("the server completed a request that was not in flight");
    auto index = slot.head;
    for (auto left = std::exchange(slot.count, std::uint16_t{0}); left > 0; --left) {
        free_descriptors_.push_back(index);
        index = descriptors_[index].next;
    }
    free_slots_.push_back(token);
    --in_flight_;
    return Completion{token, std::to_integer<std::uint8_t>(*memory_.at(slot.status)), element->len};
}

void Queue::ask_for_calls(bool wanted) {
    if (has(feature::event_idx)) {
        // The server calls once for each index. An index that it has passed stands for no calls.
        if (wanted) store(*call_index_, next_used_);
    } else {
        store(available_->flags, wanted ? 0 : VRING_AVAIL_F_NO_INTERRUPT);
    }
}

Completion Queue::wait(milliseconds timeout) {
    const auto deadline = Clock::now() + timeout;
    for (;;) {
        if (const auto completion = poll()) return *completion;
        ask_for_calls(true);
        if (const auto completion = poll()) return *completion;
        const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now());
        if (left.count() <= 0) throw std::runtime_error("the server does not complete a request");
        ++sleeps_;
        const auto [called, gone] = wait_readable(std::array{call_fd_.get(), connection_}, left);
        drain(call_fd_);
        ask_for_calls(false);
        if (gone && !called && used_index() == next_used_) throw Disconnected();
    }
}

void Queue::push(std::uint16_t head) {
    store(available_->ring[next_available_++ % size_], head);
    published_ = next_available_;
    store(available_->idx, next_available_);
    kick();
}

std::optional<vring_used_elem> Queue::pop(milliseconds timeout) {
    const auto deadline = Clock::now() + timeout;
    for (;;) {
        if (const auto element = take()) return element;
        if (Clock::now() >= deadline) return std::nullopt;
        std::this_thread::sleep_for(milliseconds(1));
    }
}

// ---- The front end ----

FrontEnd::FrontEnd(std::string socket, const Options& options)
    : socket_(std::move(socket)), options_(options), memory_(std::make_unique<GuestMemory>(options.regions)) {
    for (unsigned i = 0; i < options.queues; ++i)
        queues_.push_back(std::make_unique<Queue>(*memory_, options.queue_size, options.most_segments));
    scratch_ = memory_->allocate(scratch_bytes, page_bytes);
    connection_ = std::make_unique<Connection>(socket_);
    negotiate();
    share_memory();
}

void FrontEnd::negotiate() {
    offered_features_ = connection_->ask_number(Message::get_features);
    features_ = offered_features_ & options_.features & feature::known;
    protocol_features_ = 0;
    if (has(feature::protocol_features)) {
        offered_protocol_features_ = connection_->ask_number(Message::get_protocol_features);
        protocol_features_ = offered_protocol_features_ & options_.protocol_features & protocol::known;
        connection_->send(Message::set_protocol_features, bytes_of(protocol_features_));
    }
    set(Message::set_owner);
    set(Message::set_features, bytes_of(features_));
    if (has_protocol(protocol::backend_req)) {
        std::array<int, 2> ends;
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) fail("socketpair");
        backend_channel_ = Fd(ends[0]);
        const Fd theirs(ends[1]);
        set(Message::set_backend_req_fd, {}, std::array{theirs.get()});
    }
    for (auto& queue : queues_) queue->use(features_, connection_->fd());
}

void FrontEnd::set(Message message, std::span<const std::byte> payload, std::span<const int> fds) {
    if (!has_protocol(protocol::reply_ack)) return connection_->send(message, payload, fds);
    connection_->send(message, payload, fds, version_flag | need_reply_flag);
    const auto reply = connection_->receive();
    if (reply.header.message != message) throw std::runtime_error("not the reply to this message");
    if (reply.as<std::uint64_t>() != 0)
        throw Refused("the server refuses message " + std::to_string(static_cast<std::uint32_t>(message)));
}

void FrontEnd::share_memory() {
    const auto& regions = memory_->regions();
    if (options_.regions_one_by_one && has_protocol(protocol::configure_mem_slots)) {
        for (const auto& region : regions) {
            set(Message::add_mem_reg, payload(std::uint64_t{0}, static_cast<const MemoryRegion&>(region)),
                std::array{region.file.get()});
        }
        return;
    }
    auto table = payload(std::uint64_t{regions.size()});
    std::vector<int> fds;
    for (const auto& region : regions) {
        const auto bytes = bytes_of(static_cast<const MemoryRegion&>(region));
        table.insert(table.end(), bytes.begin(), bytes.end());
        fds.push_back(region.file.get());
    }
    set(Message::set_mem_table, table, fds);
}

void FrontEnd::share_inflight() {
    if (!has_protocol(protocol::inflight_shmfd)) return;
    if (inflight_.get() < 0) {
        inflight_area_ = {.queues = static_cast<std::uint16_t>(queues_.size()), .queue_size = options_.queue_size};
        auto reply = connection_->ask(Message::get_inflight_fd, bytes_of(inflight_area_));
        inflight_area_ = reply.as<InflightArea>();
        if (reply.fds.size() != 1) throw std::runtime_error("the server gives no memory for requests in flight");
        inflight_ = std::move(reply.fds[0]);
    }
    set(Message::set_inflight_fd, bytes_of(inflight_area_), std::array{inflight_.get()});
}

void FrontEnd::start() {
    share_inflight();
    for (unsigned i = 0; i < queues_.size(); ++i) start_queue(i);
}

void FrontEnd::send_ring_address(unsigned index) {
    const auto& queue = *queues_[index];
    set(Message::set_vring_addr,
        bytes_of(VringAddress{index, logging_ ? 1U : 0U, memory_->user(queue.descriptors_address_),
                              memory_->user(queue.used_address_), memory_->user(queue.available_address_),
                              queue.used_address_}));
}

void FrontEnd::send_fd(Message message, unsigned index, const Fd& fd) {
    set(message, bytes_of(std::uint64_t{index}), std::array{fd.get()});
}

void FrontEnd::start_queue(unsigned index) {
    auto& queue = *queues_[index];
    set(Message::set_vring_num, bytes_of(VringState{index, queue.size_}));
    set(Message::set_vring_base, bytes_of(VringState{index, queue.used_index()}));
    send_ring_address(index);
    send_fd(Message::set_vring_err, index, queue.error_fd_);
    send_fd(Message::set_vring_call, index, queue.call_fd_);
    send_fd(Message::set_vring_kick, index, queue.kick_fd_);
    if (has(feature::protocol_features)) set(Message::set_vring_enable, bytes_of(VringState{index, 1}));
    // The server starts a queue when the queue is kicked. There may also be requests on it already.
    queue.kick();
}

std::uint16_t FrontEnd::stop_queue(unsigned index) {
    return static_cast<std::uint16_t>(
        connection_->ask(Message::get_vring_base, bytes_of(VringState{index, 0})).as<VringState>().num);
}

void FrontEnd::reconnect(milliseconds timeout) {
    connection_.reset();
    connection_ = std::make_unique<Connection>(socket_, timeout);
    negotiate();
    share_memory();
    start();
}

virtio_blk_config FrontEnd::config() const {
    // Fields behind these belong to a feature that the front end does not know.
    constexpr std::uint32_t size = offsetof(virtio_blk_config, max_secure_erase_sectors);
    const auto reply =
        connection_->ask(Message::get_config, payload(ConfigHeader{0, size, 0}, std::array<std::byte, size>{}));
    virtio_blk_config result{};
    if (reply.payload.size() != sizeof(ConfigHeader) + size)
        throw Refused("the server does not give its configuration");
    std::memcpy(&result, reply.payload.data() + sizeof(ConfigHeader), size);
    return result;
}

void FrontEnd::set_config(std::uint32_t offset, std::span<const std::byte> bytes) {
    auto message = payload(ConfigHeader{offset, static_cast<std::uint32_t>(bytes.size()), 0});
    message.insert(message.end(), bytes.begin(), bytes.end());
    set(Message::set_config, message);
}

void FrontEnd::set_writeback(bool writeback) {
    set_config(offsetof(virtio_blk_config, wce), std::array{std::byte{writeback}});
}

bool FrontEnd::wait_for_config_change(milliseconds timeout) {
    constexpr std::uint32_t config_change = 2;
    if (!is_readable(backend_channel_.get(), timeout)) return false;
    Header header;
    if (recv(backend_channel_.get(), &header, sizeof header, MSG_WAITALL) != sizeof header) throw Disconnected();
    if (static_cast<std::uint32_t>(header.message) != config_change || header.size != 0)
        throw std::runtime_error("the server sends an unknown request");
    if ((header.flags & need_reply_flag) != 0) {
        const auto reply = payload(Header{header.message, version_flag | reply_flag, 8}, std::uint64_t{0});
        if (::send(backend_channel_.get(), reply.data(), reply.size(), MSG_NOSIGNAL) < 0) throw Disconnected();
    }
    return true;
}

void FrontEnd::start_log() {
    const auto size = (memory_->end() / page_bytes + 7) / 8;
    const auto mapped = (size + page_bytes - 1) / page_bytes * page_bytes;
    log_ = memory_file(mapped);
    log_bytes_ = Mapping(log_, mapped);
    static_cast<void>(connection_->ask(Message::set_log_base, payload(size, std::uint64_t{0}), std::array{log_.get()}));
    log_signal_ = event();
    set(Message::set_log_fd, {}, std::array{log_signal_.get()});
    logging_ = true;
    set(Message::set_features, bytes_of(features_ | feature::log_all));
    for (unsigned i = 0; i < queues_.size(); ++i) send_ring_address(i);
}

void FrontEnd::stop_log() {
    logging_ = false;
    set(Message::set_features, bytes_of(features_));
    for (unsigned i = 0; i < queues_.size(); ++i) send_ring_address(i);
}

bool FrontEnd::is_dirty(std::uint64_t guest) const {
    const auto page = guest / page_bytes;
    return (load(log_bytes_.bytes()[page / 8]) >> (page % 8) & std::byte{1}) != std::byte{0};
}

void FrontEnd::clear_log() { std::ranges::fill(log_bytes_.bytes(), std::byte{0}); }

std::uint8_t FrontEnd::request(std::uint32_t type, std::uint64_t sector, std::span<const Segment> segments,
                               unsigned queue) {
    auto& to = *queues_[queue];
    if (!to.submit(type, sector, segments)) throw std::runtime_error("the queue is full");
    to.publish();
    return to.wait().status;
}

std::uint8_t FrontEnd::read(std::uint64_t sector, std::span<std::byte> to, unsigned queue) {
    if (to.size() > scratch_bytes) throw std::runtime_error("a request is too long");
    const auto status =
        request(VIRTIO_BLK_T_IN, sector, std::array{Segment{scratch_, static_cast<std::uint32_t>(to.size())}}, queue);
    std::ranges::copy(memory_->bytes(scratch_, to.size()), to.begin());
    return status;
}

std::uint8_t FrontEnd::write(std::uint64_t sector, std::span<const std::byte> from, unsigned queue) {
    if (from.size() > scratch_bytes) throw std::runtime_error("a request is too long");
    std::ranges::copy(from, memory_->at(scratch_));
    return request(VIRTIO_BLK_T_OUT, sector, std::array{Segment{scratch_, static_cast<std::uint32_t>(from.size())}},
                   queue);
}

std::uint8_t FrontEnd::flush(unsigned queue) { return request(VIRTIO_BLK_T_FLUSH, 0, {}, queue); }

std::uint8_t FrontEnd::clear(std::uint32_t type, std::span<const virtio_blk_discard_write_zeroes> ranges,
                             unsigned queue) {
    std::ranges::copy(std::as_bytes(ranges), memory_->at(scratch_));
    return request(type, 0, std::array{Segment{scratch_, static_cast<std::uint32_t>(ranges.size_bytes())}}, queue);
}

}  // namespace qcow::front
