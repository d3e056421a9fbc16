#pragma once
// What is not finished, as a handler of signals that end the process can find it.

#include <string>

namespace qcow {

struct UnfinishedSlot;

/// Lists a path for abandon_new_files, from its construction to its destruction. Any number, on any threads.
class Unfinished {
public:
    enum class Kind : int {
        temporary_name,  // to be removed
        in_place,        // to be told of
    };

    Unfinished(const std::string& path, Kind kind);
    Unfinished(const Unfinished&) = delete;
    Unfinished& operator=(const Unfinished&) = delete;
    ~Unfinished();

private:
    UnfinishedSlot* slot_;
};

}  // namespace qcow
