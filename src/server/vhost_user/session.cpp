#include "server/vhost_user/session.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/bits.h"

namespace qcow::vhost_user {
namespace {

constexpr std::uint64_t offered_protocol_features =
    protocol::mq | protocol::log_shmfd | protocol::reply_ack | protocol::backend_req | protocol::config |
    protocol::inflight_shmfd | protocol::reset_device | protocol::configure_mem_slots | protocol::status;

// The record of requests in flight. Front ends keep it, and do not look into it.
constexpr std::uint64_t cache_mode_bytes = 64;      // aligns what follows
constexpr std::uint64_t unflushed_bytes = 8 * MiB;  // for what is complete and only this process has

std::unexpected<Error> refuse(std::string why) { return fail(Errc::invalid_argument, "", std::move(why)); }

}  // namespace

/// What a message must look like, and who does what it asks for.
struct Session::Handler {
    std::string_view name;
    Result<void> (Session::*work)(Message&);
    Request request;
    std::uint32_t min_payload = 0;
    std::uint32_t max_payload = 0;
    std::uint32_t max_descriptors = 0;
    bool replies = false;    // by itself
    bool stops_all = false;  // no queue may run meanwhile
};

const Session::Handler* Session::handler_of(std::uint32_t request) {
    constexpr std::uint32_t number = sizeof(std::uint64_t);
    constexpr std::uint32_t pair = sizeof(QueueNumber);
    constexpr std::uint32_t table = sizeof(MemoryTable);
    constexpr std::uint32_t region = sizeof(MemoryRegion);
    constexpr std::uint32_t part = sizeof(ConfigurationPart);
    constexpr std::uint32_t inflight = sizeof(InflightPlace);
    constexpr bool replies = true;
    constexpr bool all = true;
    using S = Session;
    static constexpr Handler handlers[] = {
        {"GET_FEATURES", &S::get_features, Request::get_features, 0, 0, 0, replies},
        {"SET_FEATURES", &S::set_features, Request::set_features, number, number, 0, false, all},
        {"SET_OWNER", &S::nothing, Request::set_owner},
        {"RESET_OWNER", &S::reset_owner, Request::reset_owner, 0, number, 0, false, all},
        {"SET_MEM_TABLE", &S::set_mem_table, Request::set_mem_table, 8, table, 8, false, all},
        {"SET_LOG_BASE", &S::set_log_base, Request::set_log_base, sizeof(LogPlace), sizeof(LogPlace), 1, replies, all},
        {"SET_LOG_FD", &S::nothing, Request::set_log_fd, 0, number, 1},
        {"SET_VRING_NUM", &S::set_vring_num, Request::set_vring_num, pair, pair},
        {"SET_VRING_ADDR", &S::set_vring_addr, Request::set_vring_addr, sizeof(QueueAddresses), sizeof(QueueAddresses)},
        {"SET_VRING_BASE", &S::set_vring_base, Request::set_vring_base, pair, pair},
        {"GET_VRING_BASE", &S::get_vring_base, Request::get_vring_base, pair, pair, 0, replies},
        {"SET_VRING_KICK", &S::set_vring_kick, Request::set_vring_kick, number, number, 1},
        {"SET_VRING_CALL", &S::set_vring_call, Request::set_vring_call, number, number, 1},
        {"SET_VRING_ERR", &S::set_vring_err, Request::set_vring_err, number, number, 1},
        {"GET_PROTOCOL_FEATURES", &S::get_protocol_features, Request::get_protocol_features, 0, 0, 0, replies},
        {"SET_PROTOCOL_FEATURES", &S::set_protocol_features, Request::set_protocol_features, number, number},
        {"GET_QUEUE_NUM", &S::get_queue_num, Request::get_queue_num, 0, 0, 0, replies},
        {"SET_VRING_ENABLE", &S::set_vring_enable, Request::set_vring_enable, pair, pair},
        {"SET_BACKEND_REQ_FD", &S::set_backend_req_fd, Request::set_backend_req_fd, 0, number, 1},
        {"GET_CONFIG", &S::get_config, Request::get_config, configuration_head, part, 0, replies},
        {"SET_CONFIG", &S::set_config, Request::set_config, configuration_head, part},
        {"GET_INFLIGHT_FD", &S::get_inflight_fd, Request::get_inflight_fd, inflight_bytes, inflight, 0, replies, all},
        {"SET_INFLIGHT_FD", &S::set_inflight_fd, Request::set_inflight_fd, inflight_bytes, inflight, 1, false, all},
        {"RESET_DEVICE", &S::reset_owner, Request::reset_device, 0, number, 0, false, all},
        {"GET_MAX_MEM_SLOTS", &S::get_max_mem_slots, Request::get_max_mem_slots, 0, 0, 0, replies},
        {"ADD_MEM_REG", &S::add_mem_reg, Request::add_mem_reg, region, region, 1, false, all},
        {"REM_MEM_REG", &S::rem_mem_reg, Request::rem_mem_reg, region, region, 1, false, all},
        {"SET_STATUS", &S::set_status, Request::set_status, number, number, 0, false, all},
        {"GET_STATUS", &S::get_status, Request::get_status, 0, 0, 0, replies},
    };
    const auto* const found =
        std::ranges::find(handlers, request, [](const auto& h) { return static_cast<std::uint32_t>(h.request); });
    return found == std::end(handlers) ? nullptr : found;
}

Session::Session(int socket, Device& device, const VhostUserOptions& options)
    : socket_(socket), device_(device), options_(options), states_(options.queues), queues_(options.queues) {
    device_.accept(0);
}

Session::~Session() { stop_queues(); }

void Session::stop_queues() {
    for (auto& queue : queues_) queue.reset();
}

Result<bool> Session::serve_message() {
    auto message = TRY(receive(socket_));
    if (!message) return false;
    const auto* const handler = handler_of(message->header.request);
    auto done = dispatch(*message, handler);
    if (done) done = start_queues();
    const bool acknowledged = (message->header.flags & wants_reply) != 0 &&
                              (protocol_features_ & protocol::reply_ack) != 0 &&
                              (handler == nullptr || !handler->replies);
    if (acknowledged) {
        TRY_VOID(reply(*message, std::uint64_t{done ? 0U : 1U}));
        if (!done && options_.complain) options_.complain(done.error().message());
    } else if (!done) {
        return std::unexpected(std::move(done).error());
    }
    return true;
}

Result<void> Session::dispatch(Message& message, const Handler* handler) {
    if (handler == nullptr) return refuse(fmt::format("message {} is not supported", message.header.request));
    const auto refuse_it = [&](std::string_view why) { return refuse(fmt::format("{}: {}", handler->name, why)); };
    if (message.payload.size() < handler->min_payload || message.payload.size() > handler->max_payload)
        return refuse_it("the message has another length");
    if (message.descriptors.size() > handler->max_descriptors)
        return refuse_it("the message has too many file descriptors");
    if (handler->stops_all) stop_queues();
    auto done = (this->*handler->work)(message);
    if (!done) return refuse_it(done.error().message());
    return {};
}

/// Starts the queues that are ready.
Result<void> Session::start_queues() {
    for (std::size_t i = 0; i < states_.size(); ++i) {
        auto& state = states_[i];
        if (queues_[i] || !state.is_ready()) continue;
        if (!state.inflight.empty() && state.inflight.size() < InflightRecord::bytes_for(state.ring.size))
            return refuse("the record of requests in flight is too short for the queue");
        state.ring.event_index = (features_ >> VIRTIO_RING_F_EVENT_IDX & 1) != 0;
        state.ring.indirect = (features_ >> VIRTIO_RING_F_INDIRECT_DESC & 1) != 0;
        queues_[i] = TRY(Queue::start(device_, memory_, state, options_));
    }
    return {};
}

void Session::announce_configuration() {
    if (back_channel_.get() < 0) return;
    // One that cannot take it has left, which its other socket shows.
    static_cast<void>(send(back_channel_.get(), {.request = config_change, .flags = version_1}, {}));
}

template <class Payload>
Payload Session::as(const Message& message) {
    Payload payload = {};
    std::memcpy(&payload, message.payload.data(), std::min(sizeof payload, message.payload.size()));
    return payload;
}

Result<void> Session::reply_bytes(const Message& message, std::span<const std::byte> payload, int descriptor) const {
    return send(socket_, {.request = message.header.request, .flags = version_1 | is_reply}, payload, descriptor);
}

template <class Payload>
Result<void> Session::reply(const Message& message, const Payload& payload, int descriptor) const {
    return reply_bytes(message, std::as_bytes(std::span(&payload, 1)), descriptor);
}

/// The state of a queue, which does not run any more.
Result<QueueState*> Session::halted(std::uint64_t queue) {
    if (queue >= states_.size()) return refuse(fmt::format("there is no queue {}", queue));
    queues_[queue].reset();
    return &states_[queue];
}

Result<QueueState*> Session::set_descriptor(Message& message, FileDescriptor QueueState::* which) {
    const auto payload = as<std::uint64_t>(message);
    const bool none = (payload & no_descriptor) != 0;
    if (none != message.descriptors.empty()) return refuse("the message has no file descriptor, or one that it denies");
    auto* const state = TRY(halted(payload & 0xff));
    auto& descriptor = state->*which;
    descriptor.reset(none ? -1 : message.descriptors[0].release());
    return state;
}

/// Forgets everything about the queues.
void Session::reset() {
    stop_queues();
    std::vector<QueueState> fresh(options_.queues);
    // QEMU asks afterwards where the rings were.
    for (std::size_t i = 0; i < fresh.size(); ++i) fresh[i].ring.next_available = states_[i].ring.next_available;
    states_ = std::move(fresh);
    device_.accept(0);
    record_cache_mode();
    features_ = 0;
    memory_.record_changes(false);
}

Result<void> Session::nothing(Message&) { return {}; }

Result<void> Session::get_features(Message& message) {
    return reply(message, device_.features() | log_all | has_protocol_features);
}

Result<void> Session::set_features(Message& message) {
    const auto features = as<std::uint64_t>(message);
    if ((features & ~(device_.features() | log_all | has_protocol_features)) != 0)
        return refuse("a feature was not offered");
    features_ = features;
    device_.accept(features);
    memory_.record_changes((features & log_all) != 0);
    // Without the protocol's features nobody enables a queue.
    if ((features & has_protocol_features) == 0)
        for (auto& state : states_) state.enabled = true;
    return {};
}

Result<void> Session::reset_owner(Message&) {
    reset();
    return {};
}

Result<void> Session::set_mem_table(Message& message) {
    const auto table = as<MemoryTable>(message);
    const auto bytes = offsetof(MemoryTable, regions) + table.count * sizeof(RegionDescription);
    if (table.count > table.regions.size() || message.payload.size() != bytes ||
        message.descriptors.size() != table.count)
        return refuse("the table has another length, or not a file descriptor for each region");
    memory_.clear();
    for (std::size_t i = 0; i < table.count; ++i) TRY_VOID(memory_.add(table.regions[i], message.descriptors[i].get()));
    return {};
}

Result<void> Session::set_log_base(Message& message) {
    const auto place = as<LogPlace>(message);
    if (message.descriptors.empty()) return refuse("there is no file descriptor");
    memory_.set_log(TRY(SharedMemory::map(message.descriptors[0].get(), place.offset, place.size)));
    return reply(message, std::uint64_t{0});
}

Result<void> Session::set_vring_num(Message& message) {
    const auto payload = as<QueueNumber>(message);
    auto* const state = TRY(halted(payload.queue));
    if (payload.number > SplitRing::max_size || !std::has_single_bit(payload.number))
        return refuse(fmt::format("a queue has a power of two of descriptors, at most {}", SplitRing::max_size));
    state->ring.size = static_cast<std::uint16_t>(payload.number);
    return {};
}

Result<void> Session::set_vring_addr(Message& message) {
    const auto payload = as<QueueAddresses>(message);
    auto* const state = TRY(halted(payload.queue));
    state->ring.addresses = {payload.descriptors, payload.used, payload.available, payload.log,
                             (payload.flags & ring_is_logged) != 0};
    state->addressed = true;
    return {};
}

Result<void> Session::set_vring_base(Message& message) {
    const auto payload = as<QueueNumber>(message);
    auto* const state = TRY(halted(payload.queue));
    if (payload.number > 0xffff) return refuse("the base of a split ring has 16 bits");
    state->ring.next_available = static_cast<std::uint16_t>(payload.number);
    return {};
}

Result<void> Session::get_vring_base(Message& message) {
    auto payload = as<QueueNumber>(message);
    auto* const state = TRY(halted(payload.queue));
    state->started = false;
    state->kick.reset(-1);
    payload.number = state->ring.next_available;
    return reply(message, payload);
}

Result<void> Session::set_vring_kick(Message& message) {
    TRY(set_descriptor(message, &QueueState::kick))->started = true;
    return {};
}

Result<void> Session::set_vring_call(Message& message) {
    TRY(set_descriptor(message, &QueueState::call));
    return {};
}

Result<void> Session::set_vring_err(Message& message) {
    TRY(set_descriptor(message, &QueueState::error));
    return {};
}

Result<void> Session::get_protocol_features(Message& message) { return reply(message, offered_protocol_features); }

Result<void> Session::set_protocol_features(Message& message) {
    const auto features = as<std::uint64_t>(message);
    if ((features & ~offered_protocol_features) != 0) return refuse("a feature was not offered");
    protocol_features_ = features;
    return {};
}

Result<void> Session::get_queue_num(Message& message) { return reply(message, std::uint64_t{options_.queues}); }

Result<void> Session::set_vring_enable(Message& message) {
    const auto payload = as<QueueNumber>(message);
    TRY(halted(payload.queue))->enabled = payload.number != 0;
    return {};
}

Result<void> Session::set_backend_req_fd(Message& message) {
    if (message.descriptors.empty()) return refuse("there is no file descriptor");
    back_channel_.reset(message.descriptors[0].release());
    return {};
}

Result<void> Session::get_config(Message& message) {
    auto part = as<ConfigurationPart>(message);
    const auto configuration = device_.configuration();
    const auto bytes = std::as_bytes(std::span(&configuration, 1));
    if (part.size > part.bytes.size() || part.offset > part.bytes.size() - part.size) {
        // This is how the protocol says that there is an error.
        part.size = 0;
    }
    part.bytes = {};
    for (std::size_t i = 0; i < part.size && part.offset + i < bytes.size(); ++i)
        part.bytes[i] = bytes[part.offset + i];
    return reply_bytes(message, std::as_bytes(std::span(&part, 1)).first(configuration_head + part.size));
}

Result<void> Session::set_config(Message& message) {
    const auto part = as<ConfigurationPart>(message);
    if (part.size > part.bytes.size() || message.payload.size() != configuration_head + part.size)
        return refuse("the message has another length than it says");
    TRY_VOID(device_.write_configuration(part.offset, std::span(part.bytes).first(part.size)));
    record_cache_mode();
    return {};
}

/// The record of a front end is what is left if this process is killed. Behind the queues, a byte of it says that the
/// driver has chosen to write through: front ends do not say so again.
void Session::record_cache_mode() {
    if (!cache_mode_record_.empty()) cache_mode_record_.front() = device_.write_back() ? std::byte{0} : std::byte{1};
}

Result<void> Session::map_inflight(const InflightPlace& place, int fd) {
    if (place.queues == 0 || place.queues > states_.size() || place.queue_size == 0 ||
        place.queue_size > SplitRing::max_size)
        return refuse("there are no such queues");
    const auto each = InflightRecord::bytes_for(place.queue_size);
    if (place.offset % alignof(std::uint64_t) != 0 || place.size < each * place.queues)
        return refuse("the record is too short, or not aligned");
    inflight_ = std::make_shared<SharedMemory>(TRY(SharedMemory::map(fd, place.offset, place.size)));
    const auto bytes = inflight_->bytes();
    for (std::size_t i = 0; i < states_.size(); ++i)
        states_[i].inflight = i < place.queues ? bytes.subspan(i * each, each) : std::span<std::byte>();
    cache_mode_record_ = bytes.subspan(each * place.queues);
    // Another server may have made a shorter record.
    if (cache_mode_record_.size() < cache_mode_bytes + unflushed_bytes) return {};
    return device_.survive_in({cache_mode_record_.subspan(cache_mode_bytes, unflushed_bytes), inflight_});
}

Result<void> Session::get_inflight_fd(Message& message) {
    auto place = as<InflightPlace>(message);
    place.size = InflightRecord::bytes_for(place.queue_size) * place.queues + cache_mode_bytes + unflushed_bytes;
    place.offset = 0;
    const FileDescriptor fd(memfd_create("inflight", MFD_CLOEXEC));
    if (fd.get() < 0 || ftruncate(fd.get(), static_cast<off_t>(place.size)) != 0)
        return system_error("cannot be made", "record of requests in flight", errno);
    TRY_VOID(map_inflight(place, fd.get()));
    return reply_bytes(message, std::as_bytes(std::span(&place, 1)).first(message.payload.size()), fd.get());
}

Result<void> Session::set_inflight_fd(Message& message) {
    if (message.descriptors.empty()) return refuse("there is no file descriptor");
    TRY_VOID(map_inflight(as<InflightPlace>(message), message.descriptors[0].get()));
    if (!cache_mode_record_.empty() && cache_mode_record_.front() != std::byte{0}) device_.set_write_back(false);
    return {};
}

Result<void> Session::get_max_mem_slots(Message& message) {
    return reply(message, std::uint64_t{GuestMemory::max_regions});
}

Result<void> Session::add_mem_reg(Message& message) {
    if (message.descriptors.empty()) return refuse("there is no file descriptor");
    return memory_.add(as<MemoryRegion>(message).region, message.descriptors[0].get());
}

Result<void> Session::rem_mem_reg(Message& message) { return memory_.remove(as<MemoryRegion>(message).region); }

Result<void> Session::set_status(Message& message) {
    status_ = as<std::uint64_t>(message);
    if (status_ == 0) reset();
    return {};
}

Result<void> Session::get_status(Message& message) { return reply(message, status_); }

}  // namespace qcow::vhost_user
