// Drives a vhost-user-blk server without a guest, and measures it or verifies what it stores.
//
//   vhost_load SOCKET --rw randread --bs 4k --depth 32 --queues 2 --seconds 3 --json
//   vhost_load SOCKET --verify --queues 4 --size 1g --seconds 60 --seed 7
//   vhost_load FILE --file --rw read --bs 1m --depth 16
//
// One thread per queue keeps `depth` requests in flight. It sleeps when nothing is complete; --spin polls instead.
// --file reads or writes a raw file with preadv and pwritev in place of a server, from the same kind of memory: as many
// threads as queues, one request at a time each. --verify runs a mixture by 16 jobs and exits with 1 if the disk ever
// holds what it cannot hold.

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "support/vhost/mixture.h"

namespace {

using namespace qcow::front;
using Clock = std::chrono::steady_clock;

struct Arguments {
    std::string target;
    std::string way = "randread";
    std::uint64_t block = 4096;
    std::uint64_t segment = 65536;
    std::uint64_t size = 0;
    unsigned depth = 32;
    unsigned queues = 1;
    double seconds = 3;
    bool spin = false;
    bool file = false;
    bool verify = false;
    bool no_clears = false;
    bool json = false;
    std::uint64_t seed = 1;
};

constexpr double mixed_writes = 0.3;

/// The requests of one thread: where each is, and which way.
class Sequence {
public:
    Sequence(const Arguments& arguments, std::uint64_t size, unsigned thread)
        : engine_(arguments.seed * 1000 + thread),
          block_(arguments.block),
          blocks_(size / arguments.block),
          random_(arguments.way.starts_with("rand") || arguments.way == "mixed"),
          writes_(arguments.way == "mixed"           ? mixed_writes
                  : arguments.way.ends_with("write") ? 1
                                                     : 0),
          // Sequential threads each begin in a part of their own.
          next_(blocks_ * thread / arguments.queues) {
        if (blocks_ == 0) throw std::runtime_error("the disk is smaller than a request");
    }

    std::uint64_t next_offset() { return (random_ ? engine_() % blocks_ : next_++ % blocks_) * block_; }
    bool next_is_write() {
        if (writes_ == 0 || writes_ == 1) return writes_ == 1;
        return static_cast<double>(engine_() >> 11) * 0x1p-53 < writes_;
    }

private:
    std::mt19937_64 engine_;
    std::uint64_t block_;
    std::uint64_t blocks_;
    bool random_;
    double writes_;
    std::uint64_t next_;
};

struct Tally {
    std::uint64_t requests = 0;
    std::uint64_t kicks = 0;
    std::uint64_t sleeps = 0;
};

class Deadline {
public:
    explicit Deadline(double seconds)
        : begin_(Clock::now()),
          end_(begin_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))) {}
    [[nodiscard]] bool is_over() const { return Clock::now() >= end_; }
    [[nodiscard]] double passed() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

private:
    Clock::time_point begin_, end_;
};

std::vector<Segment> segments_of(const Arguments& arguments, std::uint64_t buffer) {
    std::vector<Segment> segments;
    for (std::uint64_t at = 0; at < arguments.block; at += arguments.segment) {
        segments.push_back(
            {buffer + at, static_cast<std::uint32_t>(std::min(arguments.segment, arguments.block - at))});
    }
    return segments;
}

Tally drive(const Arguments& arguments, FrontEnd& front, std::uint64_t size, unsigned index,
            const std::vector<std::uint64_t>& buffers, const Deadline& deadline) {
    auto& queue = front.queue(index);
    Sequence sequence(arguments, size, index);
    std::vector<std::vector<Segment>> segments;
    for (const auto buffer : buffers) segments.push_back(segments_of(arguments, buffer));
    std::vector<std::size_t> buffer_of(queue.size());
    const auto submit = [&](std::size_t buffer) {
        const auto type = sequence.next_is_write() ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
        const auto token =
            queue.submit(static_cast<std::uint32_t>(type), sequence.next_offset() / 512, segments[buffer]);
        if (!token) throw std::runtime_error("the depth is greater than what the queue holds");
        buffer_of[*token] = buffer;
    };
    Tally tally;
    bool over = false;
    const auto complete = [&](const Completion& completion) {
        if (completion.status != VIRTIO_BLK_S_OK)
            throw std::runtime_error(fmt::format("a request failed with status {}", completion.status));
        ++tally.requests;
        if (!over) submit(buffer_of[completion.token]);
    };
    for (std::size_t i = 0; i < buffers.size(); ++i) submit(i);
    queue.publish();
    while (queue.in_flight() > 0) {
        if (arguments.spin) {
            while (queue.used_index() == queue.next_used()) over = over || deadline.is_over();
        }
        complete(queue.wait());
        while (const auto completion = queue.poll()) complete(*completion);
        queue.publish();
        over = over || deadline.is_over();
    }
    tally.kicks = queue.kicks();
    tally.sleeps = queue.sleeps();
    return tally;
}

Tally loop(const Arguments& arguments, int file, const GuestMemory& memory, std::uint64_t size, unsigned index,
           const std::vector<std::uint64_t>& buffers, const Deadline& deadline) {
    Sequence sequence(arguments, size, index);
    std::vector<std::vector<iovec>> parts;
    for (const auto buffer : buffers) {
        auto& list = parts.emplace_back();
        for (const auto& segment : segments_of(arguments, buffer))
            list.push_back({memory.at(segment.address), segment.length});
    }
    Tally tally;
    while (!deadline.is_over()) {
        const auto& list = parts[tally.requests % parts.size()];
        const auto at = static_cast<off_t>(sequence.next_offset());
        const auto count = static_cast<int>(list.size());
        const auto done =
            sequence.next_is_write() ? pwritev(file, list.data(), count, at) : preadv(file, list.data(), count, at);
        if (done != static_cast<ssize_t>(arguments.block)) throw std::runtime_error("the file cannot be used");
        ++tally.requests;
    }
    return tally;
}

/// Calls body(index) in a thread for each queue, and adds up.
template <class Body>
Tally in_threads(unsigned count, const Body& body) {
    std::vector<Tally> tallies(count);
    std::vector<std::exception_ptr> errors(count);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < count; ++i) {
        threads.emplace_back([&, i] {
            try {
                tallies[i] = body(i);
            } catch (...) {
                errors[i] = std::current_exception();
            }
        });
    }
    for (auto& thread : threads) thread.join();
    for (const auto& error : errors) {
        if (error) std::rethrow_exception(error);
    }
    Tally sum;
    for (const auto& tally : tallies) {
        sum.requests += tally.requests;
        sum.kicks += tally.kicks;
        sum.sleeps += tally.sleeps;
    }
    return sum;
}

void measure(const Arguments& arguments) {
    const auto data = arguments.block * arguments.depth * arguments.queues;
    const auto whole = [](std::uint64_t bytes) { return (bytes + page_bytes - 1) / page_bytes * page_bytes; };
    const auto allocate = [&](GuestMemory& memory) {
        std::vector<std::vector<std::uint64_t>> buffers(arguments.queues);
        for (auto& of_queue : buffers) {
            for (unsigned i = 0; i < arguments.depth; ++i) {
                of_queue.push_back(memory.allocate(arguments.block, page_bytes));
                std::ranges::fill(memory.bytes(of_queue.back(), arguments.block), std::byte{0x5a});
            }
        }
        return buffers;
    };
    Tally tally;
    double seconds = 0;
    if (arguments.file) {
        const Fd file(open(arguments.target.c_str(), O_RDWR | O_CLOEXEC));
        struct stat status{};
        if (file.get() < 0 || fstat(file.get(), &status) != 0)
            throw std::runtime_error(arguments.target + " cannot be opened");
        const auto size = arguments.size != 0 ? arguments.size : static_cast<std::uint64_t>(status.st_size);
        GuestMemory memory({whole(data + page_bytes)});
        const auto buffers = allocate(memory);
        const Deadline deadline(arguments.seconds);
        tally = in_threads(arguments.queues, [&](unsigned i) {
            return loop(arguments, file.get(), memory, size, i, buffers[i], deadline);
        });
        seconds = deadline.passed();
    } else {
        Options options;
        options.queues = arguments.queues;
        options.regions = {whole(data) + (std::uint64_t{8} << 20) * (arguments.queues + 1)};
        FrontEnd front(arguments.target, options);
        const auto buffers = allocate(front.memory());
        front.start();
        const auto size = arguments.size != 0 ? arguments.size : front.config().capacity * 512;
        const Deadline deadline(arguments.seconds);
        tally = in_threads(arguments.queues,
                           [&](unsigned i) { return drive(arguments, front, size, i, buffers[i], deadline); });
        seconds = deadline.passed();
        for (unsigned i = 0; i < arguments.queues; ++i) static_cast<void>(front.stop_queue(i));
    }
    const auto rate = static_cast<double>(tally.requests) / seconds;
    const auto throughput = rate * static_cast<double>(arguments.block);
    if (arguments.json) {
        std::cout << nlohmann::json{{"iops", rate},
                                    {"bytes_per_second", throughput},
                                    {"requests", tally.requests},
                                    {"kicks", tally.kicks},
                                    {"sleeps", tally.sleeps}}
                  << "\n";
    } else {
        fmt::print("{:.0f} requests/s, {:.2f} GB/s, {} requests, {} kicks, {} sleeps\n", rate, throughput / 1e9,
                   tally.requests, tally.kicks, tally.sleeps);
    }
}

void verify(const Arguments& arguments) {
    MixtureOptions mixture_options;
    mixture_options.seed = arguments.seed;
    Options options;
    options.queues = arguments.queues;
    if (arguments.no_clears) mixture_options.clears = 0;
    options.regions = {Mixture::memory_needed(mixture_options) + (std::uint64_t{8} << 20) * (arguments.queues + 1)};
    FrontEnd front(arguments.target, options);
    front.start();
    const auto disk = front.config().capacity * 512;
    mixture_options.bytes = std::min(disk, arguments.size != 0 ? arguments.size : disk) / block_bytes * block_bytes;
    Mixture mixture(front, mixture_options);
    const Deadline deadline(arguments.seconds);
    for (;;) {
        try {
            mixture.run([&] { return deadline.is_over(); });
            break;
        } catch (const Disconnected&) {
            front.reconnect(std::chrono::minutes(1));
        }
    }
    mixture.verify();
    fmt::print("verified: {} in {:.1f} s, seed {}\n", mixture.counts(), deadline.passed(), arguments.seed);
    for (unsigned i = 0; i < arguments.queues; ++i) static_cast<void>(front.stop_queue(i));
}

}  // namespace

int main(int argc, char** argv) try {
    Arguments arguments;
    CLI::App app("Drives a vhost-user-blk server without a guest.");
    const CLI::AsSizeValue size(false);
    app.add_option("target", arguments.target, "the server's socket, or a raw file with --file")->required();
    app.add_option("--rw", arguments.way)->check(CLI::IsMember({"randread", "randwrite", "read", "write", "mixed"}));
    app.add_option("--bs", arguments.block, "bytes per request")->transform(size);
    app.add_option("--segment", arguments.segment, "bytes per segment of a request")->transform(size);
    app.add_option("--size", arguments.size, "bytes of the disk that are used (default: all)")->transform(size);
    app.add_option("--depth", arguments.depth, "requests in flight per queue");
    app.add_option("--queues", arguments.queues);
    app.add_option("--seconds", arguments.seconds);
    app.add_option("--seed", arguments.seed);
    app.add_flag("--spin", arguments.spin, "poll for completions");
    app.add_flag("--file", arguments.file, "use a raw file in place of a server");
    app.add_flag("--verify", arguments.verify, "run the mixture and verify it");
    app.add_flag("--no-clears", arguments.no_clears, "leave DISCARD and WRITE_ZEROES out of the mixture");
    app.add_flag("--json", arguments.json);
    CLI11_PARSE(app, argc, argv);
    arguments.verify ? verify(arguments) : measure(arguments);
    return 0;
} catch (const std::exception& error) {
    std::cerr << "vhost_load: " << error.what() << "\n";
    return 1;
}
