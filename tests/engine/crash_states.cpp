#include "engine/crash_states.h"

namespace qcow::test {

CrashStates::CrashStates(const StorageLog& log, const Files& before) : log_(log) {
    for (const auto& [name, storage] : before) {
        auto& file = files_[name];
        file.now = contents_of(*storage);
        file.durable = file.now;
    }
}

void CrashStates::advance(std::size_t now) {
    for (; at_ < now; ++at_) apply(log_.events()[at_]);
}

std::vector<CrashStates::Pending> CrashStates::pending() const {
    std::map<std::size_t, std::vector<std::uint64_t>> sectors;
    for (const auto& [name, file] : files_) {
        for (const auto& [sector, versions] : file.pending) {
            auto before = durable_sector(file, sector);
            for (const auto& version : versions) {
                if (version.bytes != before) sectors[version.event].push_back(sector);
                before = version.bytes;
            }
        }
        for (const auto& size : file.pending_sizes) sectors[size.event];
    }
    std::vector<Pending> result;
    for (auto& [event, changed] : sectors) result.push_back({event, std::move(changed)});
    return result;
}

Files CrashStates::build(const Arrived& arrived) const {
    Files result;
    for (const auto& [name, file] : files_) {
        auto bytes = file.durable;
        for (const auto& [sector, versions] : file.pending) {
            const auto* const chosen = latest(versions, sector, arrived);
            if (chosen == nullptr) continue;
            const auto at = sector * sector_bytes;
            if (bytes.size() < at + sector_bytes) bytes.resize(at + sector_bytes);
            std::ranges::copy(chosen->bytes, bytes.begin() + static_cast<std::ptrdiff_t>(at));
        }
        const auto* const size = latest(file.pending_sizes, no_sector, arrived);
        bytes.resize(size != nullptr ? size->bytes : file.durable.size());
        result[name] = memory_storage(std::move(bytes), name);
    }
    return result;
}

Bytes CrashStates::durable_sector(const File& file, std::uint64_t sector) {
    Bytes bytes(sector_bytes);
    const auto at = std::min<std::uint64_t>(sector * sector_bytes, file.durable.size());
    std::copy_n(file.durable.begin() + static_cast<std::ptrdiff_t>(at),
                std::min<std::uint64_t>(sector_bytes, file.durable.size() - at), bytes.begin());
    return bytes;
}

void CrashStates::apply(const StorageEvent& event) {
    if (event.kind == StorageEvent::Kind::mark) return;
    auto& file = files_.at(event.file);
    switch (event.kind) {
        case StorageEvent::Kind::mark:
        case StorageEvent::Kind::flush_begin: break;
        case StorageEvent::Kind::write: write(file, event.at, event.bytes); break;
        case StorageEvent::Kind::zeroes:
            if (event.at < file.now.size())
                write(file, event.at, Bytes(std::min(event.length, file.now.size() - event.at)));
            break;
        case StorageEvent::Kind::size: resize(file, event.length); break;
        case StorageEvent::Kind::flush_end: flush(file, event.begun); break;
        case StorageEvent::Kind::flush_lost: lose(file, event.begun); break;
    }
}

void CrashStates::write(File& file, std::uint64_t at, const Bytes& bytes) {
    if (bytes.empty()) return;
    if (file.now.size() < at + bytes.size()) resize(file, at + bytes.size());
    std::ranges::copy(bytes, file.now.begin() + static_cast<std::ptrdiff_t>(at));
    touch(file, at, at + bytes.size());
}

void CrashStates::touch(File& file, std::uint64_t begin, std::uint64_t end) {
    for (auto sector = begin / sector_bytes; sector * sector_bytes < end; ++sector) {
        Bytes bytes(sector_bytes);
        const auto at = sector * sector_bytes;
        if (at < file.now.size()) {
            const auto length = std::min<std::uint64_t>(sector_bytes, file.now.size() - at);
            std::copy_n(file.now.begin() + static_cast<std::ptrdiff_t>(at), length, bytes.begin());
        }
        file.pending[sector].push_back({at_, std::move(bytes)});
    }
}

void CrashStates::resize(File& file, std::uint64_t size) {
    const auto before = file.now.size();
    if (size == before) return;
    file.now.resize(size);
    file.pending_sizes.push_back({at_, size});
    if (size < before) touch(file, size, before);
}

void CrashStates::flush(File& file, std::size_t begun) {
    if (const auto size = settle(file.pending_sizes, begun)) file.durable.resize(*size);
    for (auto it = file.pending.begin(); it != file.pending.end();) {
        if (const auto bytes = settle(it->second, begun)) {
            const auto at = it->first * sector_bytes;
            if (at < file.durable.size()) {
                const auto length = std::min<std::uint64_t>(sector_bytes, file.durable.size() - at);
                std::copy_n(bytes->begin(), length, file.durable.begin() + static_cast<std::ptrdiff_t>(at));
            }
        }
        it = it->second.empty() ? file.pending.erase(it) : std::next(it);
    }
}

void CrashStates::lose(File& file, std::size_t begun) {
    const auto mark = [&](auto& versions) {
        for (auto& version : versions) version.lost |= version.event < begun;
    };
    mark(file.pending_sizes);
    for (auto& [sector, versions] : file.pending) mark(versions);
}

}  // namespace qcow::test
