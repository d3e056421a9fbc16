#pragma once
// A library that is not linked, but loaded when it is needed.

#include <dlfcn.h>

#include <string>

namespace qcow {

/// The functions of a shared library. The library stays for the rest of the process's life. Its symbols stay apart from
/// those of others.
class LoadedLibrary {
public:
    /// Loads the library with this file name.
    explicit LoadedLibrary(const char* name) : handle_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
        note_failure(handle_, name);
    }

    /// Sets `function` to the function with this name; to nullptr if there is none.
    template <class Function>
    void find(Function& function, const char* name) {
        void* const found = handle_ == nullptr ? nullptr : dlsym(handle_, name);
        note_failure(found, name);
        function = reinterpret_cast<Function>(found);
    }

    /// What was missing first, for people. Empty: nothing.
    [[nodiscard]] const std::string& error() const { return error_; }

private:
    void note_failure(const void* found, const char* name) {
        if (found != nullptr || !error_.empty()) return;
        const char* const why = dlerror();
        error_ = why == nullptr ? name : why;
    }

    void* handle_;
    std::string error_;
};

}  // namespace qcow
