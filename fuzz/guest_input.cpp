// A virtual machine that puts anything at all into its memory, and its front end that says anything at all.

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "base/bits.h"
#include "fuzz/inputs.h"
#include "fuzz/require.h"
#include "qcow/image.h"
#include "qcow/vhost_user.h"
#include "server/vhost_user/session.h"

namespace qcow::fuzz {
namespace {

using namespace vhost_user;

constexpr std::uint64_t memory_bytes = 64 * KiB;
constexpr std::uint64_t disk_bytes = 100 * KiB;

/// A file of memory that begins with these bytes.
FileDescriptor memory_with(std::span<const std::byte> bytes) {
    FileDescriptor fd(memfd_create("guest", MFD_CLOEXEC));
    QCOW_REQUIRE(ftruncate(fd.get(), memory_bytes) == 0);
    bytes = bytes.first(std::min<std::size_t>(bytes.size(), memory_bytes));
    QCOW_REQUIRE(pwrite(fd.get(), bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
    return fd;
}

std::shared_ptr<Image> new_disk() {
    const auto storage = memory_storage(std::vector(disk_bytes, std::byte{'d'}));
    auto disk = open_image(storage, {.writable = true, .format = Format::raw});
    QCOW_REQUIRE(disk.has_value());
    return *std::move(disk);
}

/// A ring of 16 descriptors at the beginning of the memory, which has a hole in the guest's addresses.
void run_ring(std::span<const std::byte> input, unsigned mode) {
    const auto fd = memory_with(input);
    GuestMemory memory;
    constexpr std::uint64_t half = memory_bytes / 2;
    QCOW_REQUIRE(memory.add({0, half, 0, 0}, fd.get()).has_value());
    QCOW_REQUIRE(memory.add({2 * half, half, half, half}, fd.get()).has_value());
    const bool read_only = (mode & 2) != 0;
    const auto disk = new_disk();
    Device device(disk, {.read_only = read_only, .queues = 1, .block_size = (mode & 4) != 0 ? 4096U : 512U});
    device.accept(device.features());
    auto ring = SplitRing::find(memory, {.size = 16,
                                         .addresses = {.descriptors = 0, .used = 0x140, .available = 0x100},
                                         .event_index = (mode & 8) != 0,
                                         .indirect = (mode & 16) != 0});
    QCOW_REQUIRE(ring.has_value());
    Chain chain;
    // Requests change the ring, too, if the guest says so.
    for (int i = 0; i < 64; ++i) {
        const auto head = ring->next();
        if (!head || !*head) break;
        std::uint32_t written = 0;
        if (ring->load(**head, chain)) {
            QCOW_REQUIRE(chain.readable.size() + chain.writable.size() <= std::size_t{2} * SplitRing::max_size);
            written = device.perform(Device::parse(chain), memory);
            QCOW_REQUIRE(written <= chain.bytes);
        }
        ring->complete(**head, written);
        static_cast<void>(ring->wants_interrupt());
        ring->ask_for_kicks((i & 1) != 0);
    }
    QCOW_REQUIRE(memory.losses() == 0);
    if (!read_only) return;
    std::vector<std::byte> after(disk_bytes);
    QCOW_REQUIRE(disk->read({0}, after).has_value());
    QCOW_REQUIRE(after == std::vector(disk_bytes, std::byte{'d'}));
}

/// Sends a message with as many descriptors as it says: of memory, or of an event.
void send_record(int socket, std::span<const std::byte> header, std::span<const std::byte> payload, unsigned memories,
                 unsigned events, int memory, int event) {
    std::vector<int> descriptors(memories, memory);
    descriptors.insert(descriptors.end(), events, event);
    std::array<iovec, 2> pieces = {{{const_cast<std::byte*>(header.data()), header.size()},
                                    {const_cast<std::byte*>(payload.data()), payload.size()}}};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int[16]))> control = {};
    msghdr message = {};
    message.msg_iov = pieces.data();
    message.msg_iovlen = pieces.size();
    if (!descriptors.empty()) {
        message.msg_control = control.data();
        message.msg_controllen = CMSG_SPACE(descriptors.size() * sizeof(int));
        auto* const part = CMSG_FIRSTHDR(&message);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
        std::memcpy(CMSG_DATA(part), descriptors.data(), descriptors.size() * sizeof(int));
    }
    QCOW_REQUIRE(sendmsg(socket, &message, 0) == static_cast<ssize_t>(header.size() + payload.size()));
}

/// Messages: the number of the request, flags, numbers of descriptors, the length of the payload, the payload.
void run_messages(std::span<const std::byte> input) {
    const auto memory = memory_with(input);
    const FileDescriptor event(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    std::array<int, 2> ends = {};
    QCOW_REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0);
    FileDescriptor ours(ends[0]);
    const FileDescriptor theirs(ends[1]);
    const VhostUserOptions options = {.queues = 2, .workers = 1};
    Device device(new_disk(), options);
    Session session(theirs.get(), device, options);
    const auto byte = [&](std::size_t i) { return static_cast<unsigned>(input[i]); };
    while (input.size() >= 4) {
        const std::uint32_t flags = byte(1);
        const unsigned descriptors = byte(2);
        const std::size_t length = std::min<std::size_t>(byte(3), input.size() - 4);
        const Header header = {byte(0), flags, static_cast<std::uint32_t>(length)};
        send_record(ours.get(), std::as_bytes(std::span(&header, 1)), input.subspan(4, length), descriptors & 7,
                    descriptors >> 3 & 7, memory.get(), event.get());
        input = input.subspan(4 + length);
        const auto served = session.serve_message();
        if (!served || !*served) return;
        std::array<std::byte, 4096> reply;
        while (recv(ours.get(), reply.data(), reply.size(), MSG_DONTWAIT) > 0) {
        }
    }
    // Half of a message, and the end.
    ours.reset(-1);
    const auto served = session.serve_message();
    QCOW_REQUIRE(served.has_value());
    QCOW_REQUIRE(!*served);
}

}  // namespace

void run_guest_input(std::span<const std::byte> input) {
    if (input.empty()) return;
    const auto mode = static_cast<unsigned>(input.front());
    if ((mode & 1) == 0) {
        run_ring(input.subspan(1), mode);
    } else {
        run_messages(input.subspan(1));
    }
}

}  // namespace qcow::fuzz
