// A kernel with its arguments, between the generated table of kernels and device.cpp
#pragma once

namespace launch {

constexpr int N_BUFFER = 16;

struct arguments {
    char *         buffer[N_BUFFER]; // by index; constant arguments are at index 0
    char *         shmem;            // [[threadgroup(0)]]
    unsigned       group[3];         // [[threadgroup_position_in_grid]]
    unsigned short thread_in_group;
    unsigned short thread_in_simd;
    unsigned short simd_in_group;
};

struct kernel_entry {
    const char * name; // [[host_name]], or the name of the function
    void (*run)(const arguments &);
};

const kernel_entry * find(const char * name);

} // namespace launch
