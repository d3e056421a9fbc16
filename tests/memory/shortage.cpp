#include "memory/shortage.h"

#include <cstdlib>
#include <new>

namespace qcow::test {

thread_local Shortage shortage;

}  // namespace qcow::test

// NOLINTBEGIN(misc-new-delete-overloads): these are all that are used
void* operator new(std::size_t size) {
    if (qcow::test::shortage.strikes()) throw std::bad_alloc();
    if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
    throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t& /*unused*/) noexcept {
    return qcow::test::shortage.strikes() ? nullptr : std::malloc(size == 0 ? 1 : size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t& /*unused*/) noexcept { std::free(memory); }
// NOLINTEND(misc-new-delete-overloads)
