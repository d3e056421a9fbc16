#include "support/vhost/mixture.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <thread>

namespace qcow::front {

using test::sector_bytes;

void BlockModel::preset(std::uint64_t block, Value value) { blocks_[block].versions = {{value, 0, 0}}; }

Tick BlockModel::begin(const Range& range, Value value, bool weak) {
    const std::lock_guard lock(mutex_);
    const auto begun = now();
    for (auto i = range.first; i < range.first + range.count; ++i) {
        auto& versions = blocks_[i].versions;
        // What was replaced can never come back.
        std::erase_if(versions, [&](const Version& earlier) {
            return std::ranges::any_of(versions, [&](const Version& later) { return replaces(later, earlier); });
        });
        versions.push_back({value, begun, never, weak});
    }
    return begun;
}

void BlockModel::end(const Range& range, Tick begun) {
    const std::lock_guard lock(mutex_);
    const auto ended = now();
    for (auto i = range.first; i < range.first + range.count; ++i) {
        std::ranges::find(blocks_[i].versions, begun, &Version::begin)->end = ended;
        blocks_[i].last_end = ended;
    }
}

std::optional<std::string> BlockModel::complaint(std::uint64_t first, std::span<const std::byte> bytes,
                                                 Tick begun) const {
    const std::lock_guard lock(mutex_);
    for (std::uint64_t i = 0; i < bytes.size() / block_bytes; ++i) {
        const auto& block = blocks_[first + i];
        const auto& versions = block.versions;
        const auto in_flight = [](const Version& version) { return version.end == never; };
        if (block.last_end > begun || std::ranges::any_of(versions, in_flight)) continue;
        const auto is_allowed = [&](const Version& version) {
            return std::ranges::none_of(versions, [&](const Version& later) { return replaces(later, version); });
        };
        for (std::uint64_t j = 0; j < block_sectors; ++j) {
            const auto sector = (first + i) * block_sectors + j;
            const auto found = test::value_in(sector, bytes.subspan(i * block_bytes + j * sector_bytes, sector_bytes));
            if (std::ranges::any_of(
                    versions, [&](const Version& version) { return version.value == found && is_allowed(version); }))
                continue;
            std::string allowed;
            for (const auto& version : versions) {
                if (is_allowed(version)) allowed += fmt::format(" {}", version.value);
            }
            return fmt::format("sector {} holds {}, not one of:{}", sector,
                               found == test::foreign ? "foreign bytes" : fmt::format("write {}", found), allowed);
        }
    }
    return std::nullopt;
}

std::uint64_t Mixture::memory_needed(const MixtureOptions& options) {
    return std::uint64_t{options.jobs} * options.depth * options.longest * block_bytes;
}

Mixture::Mixture(FrontEnd& front, const MixtureOptions& options)
    : front_(front), options_(options), model_(options.bytes / block_bytes), workers_(front.queues()) {
    Random random(options.seed);
    for (unsigned i = 0; i < options.jobs; ++i) {
        auto& job = jobs_.emplace_back(random.below(~std::uint64_t{0}));
        for (unsigned j = 0; j < options.depth; ++j)
            job.free_buffers.push_back(front.memory().allocate(options.longest * block_bytes, page_bytes));
        workers_[i % workers_.size()].jobs.push_back(i);
    }
    Value greatest = 0;
    read_all([&](std::uint64_t at, Tick, std::span<const std::byte> bytes) {
        for (std::uint64_t i = 0; i < bytes.size() / block_bytes; ++i) {
            std::optional<Value> common;
            for (std::uint64_t j = 0; j < block_sectors; ++j) {
                const auto in_block = i * block_bytes + j * sector_bytes;
                const auto value =
                    test::value_in((at + in_block) / sector_bytes, bytes.subspan(in_block, sector_bytes));
                common = !common || *common == value ? value : test::foreign;
            }
            model_.preset(at / block_bytes + i, *common);
            if (*common != test::foreign) greatest = std::max(greatest, *common);
        }
    });
    next_value_ = greatest + 1;
}

void Mixture::run(const std::function<bool()>& enough) {
    stopped_ = false;
    std::vector<std::exception_ptr> errors(workers_.size());
    std::atomic<bool> disconnected = false;
    std::vector<std::thread> threads;
    threads.reserve(workers_.size());
    for (unsigned i = 0; i < workers_.size(); ++i) {
        threads.emplace_back([&, i] {
            try {
                work(i, enough);
                return;
            } catch (const Disconnected&) {
                disconnected = true;
            } catch (...) {
                errors[i] = std::current_exception();
            }
            stopped_ = true;
        });
    }
    for (auto& thread : threads) thread.join();
    // An error of the disk says more than the end of the connection.
    for (const auto& error : errors) {
        if (error) std::rethrow_exception(error);
    }
    if (disconnected) throw Disconnected();
}

void Mixture::work(unsigned index, const std::function<bool()>& enough) {
    auto& worker = workers_[index];
    auto& queue = front_.queue(index);
    for (;;) {
        const bool ending = stopped_ || enough();
        bool room = true;
        for (const auto i : worker.jobs) {
            auto& job = jobs_[i];
            while (room && !ending && (job.waiting || !job.free_buffers.empty())) {
                if (!job.waiting) job.waiting = next_request(i);
                room = submit(index, *job.waiting);
                if (room) job.waiting.reset();
            }
        }
        queue.publish();
        if (worker.in_flight.empty()) return;
        complete(worker, queue.wait());
        while (const auto completion = queue.poll()) complete(worker, *completion);
    }
}

BlockModel::Range Mixture::choose(Random& random, std::uint64_t longest) const {
    const auto blocks = options_.bytes / block_bytes;
    // Half of the requests meet in a small part.
    const auto part = random.chance(50) ? std::min<std::uint64_t>(blocks, 1024) : blocks;
    const auto count = random.between(1, std::min(longest, part));
    const auto first = random.below(part - count + 1);
    return {first, std::min(count, options_.spread.rest(first * block_bytes) / block_bytes)};
}

Mixture::Request Mixture::next_request(std::size_t index) {
    auto& job = jobs_[index];
    Request request;
    request.job = index;
    request.buffer = job.free_buffers.back();
    job.free_buffers.pop_back();
    auto& random = job.random;
    request.range = choose(random, options_.longest);
    if (random.chance(options_.flushes) && front_.has(feature::flush)) {
        request.type = VIRTIO_BLK_T_FLUSH;
        request.range = {};
    } else if (!random.chance(options_.writes)) {
        request.type = VIRTIO_BLK_T_IN;
    } else if (random.chance(options_.clears)) {
        const bool discard = random.chance(50);
        request.type = discard ? VIRTIO_BLK_T_DISCARD : VIRTIO_BLK_T_WRITE_ZEROES;
        request.range = choose(random, 4 * std::uint64_t{options_.longest});
        if (!front_.has(discard ? feature::discard : feature::write_zeroes)) request.type = VIRTIO_BLK_T_IN;
        if (request.type == VIRTIO_BLK_T_IN)
            request.range.count = std::min<std::uint64_t>(request.range.count, options_.longest);
    } else {
        request.type = VIRTIO_BLK_T_OUT;
    }
    return request;
}

bool Mixture::submit(unsigned index, const Request& waiting) {
    auto request = waiting;
    auto& random = jobs_[request.job].random;
    auto length = request.range.count * block_bytes;
    const auto first = options_.spread.place(request.range.first * block_bytes) / sector_bytes;
    std::vector<Segment> segments;
    if (request.type == VIRTIO_BLK_T_DISCARD || request.type == VIRTIO_BLK_T_WRITE_ZEROES) {
        const bool unmap = request.type == VIRTIO_BLK_T_WRITE_ZEROES && random.chance(50);
        const virtio_blk_discard_write_zeroes range{first,
                                                    static_cast<std::uint32_t>(request.range.count * block_sectors),
                                                    unmap ? std::uint32_t{VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP} : 0};
        std::memcpy(front_.memory().at(request.buffer), &range, sizeof range);
        segments.push_back({request.buffer, sizeof range});
    } else if (request.type != VIRTIO_BLK_T_FLUSH) {
        for (std::uint64_t at = 0; at < length;) {
            const auto sectors = (length - at) / sector_bytes;
            const auto part = segments.size() == 7 ? sectors : random.between(1, sectors);
            segments.push_back({request.buffer + at, static_cast<std::uint32_t>(part * sector_bytes)});
            at += part * sector_bytes;
        }
    }
    auto& queue = front_.queue(index);
    const auto token = queue.submit(
        request.type, request.type == VIRTIO_BLK_T_IN || request.type == VIRTIO_BLK_T_OUT ? first : 0, segments);
    if (!token) return false;
    // The server sees the request later, when it is published.
    switch (request.type) {
        case VIRTIO_BLK_T_OUT: {
            const auto value = next_value_++;
            test::stamp(request.range.first * block_sectors, value, front_.memory().bytes(request.buffer, length));
            request.begun = model_.begin(request.range, value, false);
            break;
        }
        case VIRTIO_BLK_T_DISCARD: request.begun = model_.begin(request.range, 0, true); break;
        case VIRTIO_BLK_T_WRITE_ZEROES: request.begun = model_.begin(request.range, 0, false); break;
        default: request.begun = model_.now();
    }
    workers_[index].in_flight.emplace(*token, request);
    return true;
}

void Mixture::complete(Worker& worker, const Completion& completion) {
    const auto found = worker.in_flight.find(completion.token);
    const auto request = found->second;
    worker.in_flight.erase(found);
    if (completion.status != VIRTIO_BLK_S_OK) {
        throw std::runtime_error(fmt::format("request of type {} for {} blocks from block {} has status {}",
                                             request.type, request.range.count, request.range.first,
                                             completion.status));
    }
    const auto length = request.range.count * block_bytes;
    if (request.type == VIRTIO_BLK_T_IN) {
        const auto bytes = front_.memory().bytes(request.buffer, length);
        if (const auto wrong = model_.complaint(request.range.first, bytes, request.begun))
            throw std::runtime_error(*wrong);
    } else if (request.type != VIRTIO_BLK_T_FLUSH) {
        model_.end(request.range, request.begun);
    }
    jobs_[request.job].free_buffers.push_back(request.buffer);
    ++requests_;
    bytes_ += length;
    ++by_type_[request.type];
}

void Mixture::read_all(const Found& found) {
    Bytes bytes(FrontEnd::scratch_bytes);
    for (std::uint64_t at = 0; at < options_.bytes;) {
        const auto length = std::min({bytes.size(), options_.bytes - at, options_.spread.rest(at)});
        const auto part = std::span(bytes).first(length);
        const auto begun = model_.now();
        if (front_.read(options_.spread.place(at) / sector_bytes, part) != VIRTIO_BLK_S_OK)
            throw std::runtime_error(fmt::format("the disk cannot be read at byte {}", options_.spread.place(at)));
        found(at, begun, part);
        at += length;
    }
}

void Mixture::verify() {
    read_all([&](std::uint64_t at, Tick begun, std::span<const std::byte> bytes) {
        if (const auto wrong = model_.complaint(at / block_bytes, bytes, begun)) throw std::runtime_error(*wrong);
    });
}

std::string Mixture::counts() const {
    return fmt::format("{} reads, {} writes, {} discards, {} zeroes, {} flushes", by_type_[VIRTIO_BLK_T_IN].load(),
                       by_type_[VIRTIO_BLK_T_OUT].load(), by_type_[VIRTIO_BLK_T_DISCARD].load(),
                       by_type_[VIRTIO_BLK_T_WRITE_ZEROES].load(), by_type_[VIRTIO_BLK_T_FLUSH].load());
}

}  // namespace qcow::front
