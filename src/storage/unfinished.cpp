#include "storage/unfinished.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <climits>
#include <utility>

namespace qcow {

/// A place in a list that only grows: a signal handler may be looking at it at any time.
struct UnfinishedSlot {
    enum State : int { empty, filling, temporary_name, in_place, part_of_source, abandoned };
    std::atomic<int> state = filling;
    std::array<char, PATH_MAX> path = {};
    UnfinishedSlot* next = nullptr;
};

namespace {

std::atomic<UnfinishedSlot*> slots = nullptr;

UnfinishedSlot* take_slot() {
    for (auto* slot = slots.load(); slot != nullptr; slot = slot->next) {
        int expected = UnfinishedSlot::empty;
        if (slot->state.compare_exchange_strong(expected, UnfinishedSlot::filling)) return slot;
    }
    auto* slot = new UnfinishedSlot;
    slot->next = slots.load();
    while (!slots.compare_exchange_weak(slot->next, slot)) {
    }
    return slot;
}

}  // namespace

Unfinished::Unfinished(const std::string& path) : Unfinished(path, UnfinishedSlot::temporary_name) {}

Unfinished::Unfinished(const std::string& path, Incomplete what)
    : Unfinished(path,
                 what == Incomplete::written_in_place ? UnfinishedSlot::in_place : UnfinishedSlot::part_of_source) {}

Unfinished::Unfinished(const std::string& path, int state) : slot_(take_slot()) {
    // No system call takes a longer path: there is no such file.
    const auto length = path.size() < slot_->path.size() ? path.size() : 0;
    path.copy(slot_->path.data(), length);
    slot_->path[length] = '\0';
    slot_->state = state;
}

Unfinished::~Unfinished() {
    int state = slot_->state;
    // What a handler has taken stays its own.
    if (state != UnfinishedSlot::abandoned) slot_->state.compare_exchange_strong(state, UnfinishedSlot::empty);
}

void abandon_new_files(void (*incomplete)(const char* path, Incomplete what)) noexcept {
    for (auto* slot = slots.load(); slot != nullptr; slot = slot->next) {
        int state = slot->state;
        if (state == UnfinishedSlot::empty || state == UnfinishedSlot::filling || state == UnfinishedSlot::abandoned)
            continue;
        if (!slot->state.compare_exchange_strong(state, UnfinishedSlot::abandoned)) continue;
        if (state == UnfinishedSlot::temporary_name) {
            unlink(slot->path.data());
        } else {
            incomplete(slot->path.data(),
                       state == UnfinishedSlot::in_place ? Incomplete::written_in_place : Incomplete::part_of_source);
        }
    }
}

}  // namespace qcow
